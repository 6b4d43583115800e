"""gpt/pretrained.py: Hugging Face's GPT-2 weights in and out, against transformers itself."""

import hashlib
import http.server
import json
import pickle
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt import checkpoint, pretrained
from gpt.checkpoint import save_model
from gpt.config import GPTConfig
from gpt.errors import UserError
from gpt.generation import generate
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from scripts import validate
from tests.conftest import ROOT, TEXT, Fork, assert_refused, metrics, random_gpt2, run, train


def reference(folder):
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("n_layer, n_head, n_embd, n_positions, vocab_size", [
    (1, 1, 4, 1, 11), (1, 1, 16, 8, 50), (2, 3, 24, 16, 97), (3, 5, 40, 33, 257), (2, 7, 56, 64, 1000),
    (4, 2, 8, 128, 300), (1, 12, 96, 17, 65), (6, 1, 32, 20, 128), (2, 25, 100, 40, 512), (12, 3, 12, 10, 77),
    (2, 8, 64, 256, 50257), (1, 4, 20, 1024, 129), (5, 9, 63, 31, 50304)])
def test_logits_are_those_of_transformers(tmp_path, n_layer, n_head, n_embd, n_positions, vocab_size):
    """1e-4 in float32 for odd head counts and sizes, every kind of length and batch."""
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=n_positions, vocab_size=vocab_size)
    random_gpt2(tmp_path, **shape, initializer_range=0.3)
    theirs, ours = reference(tmp_path), GPT.from_pretrained(str(tmp_path))
    largest = 0.0
    for B, T in {(1, 1), (3, max(1, n_positions // 2)), (2, max(1, n_positions - 1)), (1, n_positions)}:
        idx = torch.randint(vocab_size, (B, T))
        with torch.no_grad():
            expected = theirs(idx).logits
            assert expected.std() > 0.01
            difference = (ours(idx) - expected).abs().max().item()
            assert difference <= 1e-4, (B, T)
        largest = max(largest, difference)
    print(f"\n| {n_layer} | {n_head} | {n_embd} | {n_positions} | {vocab_size} | {largest:.1e} |")


@pytest.mark.parametrize("kind", ["shards", "bin", "old bin", "sharded bin", "half", "bfloat16", "base model"])
def test_every_kind_of_weight_file_is_read(gpt2_folder, tmp_path, kind):
    """The same logits from safetensors in pieces, pickles of today and of 2019, half precision, other names."""
    theirs = reference(gpt2_folder)
    expected, idx = theirs, torch.randint(50257, (2, 48))
    if kind == "shards":
        theirs.save_pretrained(tmp_path, max_shard_size="2MB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    elif kind == "base model":
        theirs.transformer.save_pretrained(tmp_path)
    elif kind in ("half", "bfloat16"):
        theirs.to(torch.float16 if kind == "half" else torch.bfloat16).save_pretrained(tmp_path)
        expected = reference(tmp_path)
    else:
        shutil.copy(gpt2_folder / "config.json", tmp_path)
        tensors = {name: tensor for name, tensor in theirs.state_dict().items()}
        for i in range(2):  # OpenAI's files have the causal masks too
            tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
            tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        if kind == "sharded bin":
            names = list(tensors)
            for number, mine in enumerate((names[::2], names[1::2])):
                torch.save({name: tensors[name] for name in mine}, tmp_path / f"pytorch_model-{number}.bin")
            index = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        else:
            torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    with torch.no_grad():
        assert (GPT.from_pretrained(tmp_path)(idx) - expected(idx).logits).abs().max() <= 1e-4


def test_overrides(gpt2_folder, tmp_path):
    """Dropout as asked; fewer positions keep the first ones; more cannot be made up."""
    model = GPT.from_pretrained(gpt2_folder, dropout=0.5, block_size=7)
    assert model.config.dropout == 0.5 and not model.training
    idx = torch.randint(50257, (2, 7))
    with torch.no_grad():
        assert (model(idx) - reference(gpt2_folder)(idx).logits).abs().max() <= 1e-4
    assert model.wpe.weight.untyped_storage().nbytes() == 7 * 24 * 4  # not a view of all 48
    with pytest.raises(ValueError, match="does not make a model"):
        GPT.from_pretrained(gpt2_folder, block_size=49)


def test_the_tokens_are_openais():
    """The vocabulary and merges that an export writes have the hashes of OpenAI's encoder.json and vocab.bpe."""
    tokenizer = Tokenizer()
    pairs = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in tokenizer.merges())
    assert hashlib.sha256(pairs.encode()).hexdigest() == (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")
    in_order = dict(sorted(tokenizer.vocab().items(), key=lambda item: item[1]))
    assert hashlib.sha256(json.dumps(in_order).encode()).hexdigest() == (
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")


@pytest.fixture(scope="module")
def trained(data_root, tmp_path_factory):
    """A run of two steps, and its export by the command."""
    log_dir = tmp_path_factory.mktemp("trained")
    train(data_root, log_dir, "--max_steps", "2", "--eval_every", "2", "--sample_every", "0")
    done = run("-m", "scripts.export", "--log_dir", log_dir, "--out", log_dir / "hf")
    assert done.returncode == 0, done.stderr
    assert "model_00002.pt: step 2" in done.stderr
    return log_dir


def test_an_export_comes_back_bit_by_bit(trained):
    """Export, then from_pretrained: every weight and the whole shape."""
    saved = checkpoint.load_checkpoint(trained / "model_00002.pt")
    model = GPT.from_pretrained(trained / "hf")
    assert vars(model.config) == saved["config"]
    weights = model.state_dict()
    assert weights.keys() == saved["model"].keys()
    assert all(torch.equal(weights[name], saved["model"][name]) for name in weights)


def test_transformers_continues_an_export_as_we_do(trained):
    """The same greedy tokens from `model.generate` and from our `generate`, to the end of the context."""
    theirs, ours = reference(trained / "hf"), GPT.from_pretrained(trained / "hf")
    prompt = Tokenizer().encode("Before we proceed any")
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=32 - len(prompt))[0].tolist()
    ids = [token for token, in generate(ours, [prompt], 32 - len(prompt), temperature=0)]
    assert prompt + ids == expected
    assert theirs.config.n_ctx == theirs.config.n_positions == 32  # llama.cpp's converter reads n_ctx
    assert theirs.generation_config.eos_token_id == 50256


def test_the_exported_tokenizer_is_ours(trained):
    """AutoTokenizer gives the same ids on a play and on strange text, special token and all, and the text back."""
    theirs, ours = AutoTokenizer.from_pretrained(trained / "hf"), Tokenizer()
    assert theirs.model_max_length == 32 and theirs.eos_token == "<|endoftext|>"

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def same(text):
        ids = ours.encode(text, allow_special=True)
        assert theirs(text).input_ids == ids

    same()
    for text in (TEXT.read_text(), "A  b\n\n\t c'll 12<|endoftext|>émigré 東京 🙂 don't", " "):
        ids = ours.encode(text, allow_special=True)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_model_card_says_where_it_comes_from(trained, data_root):
    """Data, tokens, losses and settings, as the run's own log has them."""
    card = (trained / "hf" / "README.md").read_text()
    loss, val_loss = metrics(trained, "train")[1]["loss"], metrics(trained, "val")[2]["loss"]
    for words in (str(data_root), "2 steps of 256 tokens, 512 in all", f"training, last step | {loss:.4f}",
                  f"validation | {val_loss:.4f}", "max_lr: 0.01", "2 layers, 2 heads, width 16, context 32"):
        assert words in card, words
    assert {path.name for path in (trained / "hf").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md"}


def test_an_export_overwrites_nothing(trained):
    """A folder with something in it is refused and stays as it is."""
    before = {path.name: path.read_bytes() for path in (trained / "hf").iterdir()}
    assert_refused(run("-m", "scripts.export", "--log_dir", trained, "--out", trained / "hf"), "is not empty")
    assert {path.name: path.read_bytes() for path in (trained / "hf").iterdir()} == before


def test_a_full_disk_leaves_no_half_export(trained, tmp_path):
    """Whichever file it hits: one line, and no folder, not even a hidden one."""
    for kilobytes in (100, 3600):  # of a file: the tokenizer does not fit, or everything does
        limited = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$0" -m scripts.export "$@"', sys.executable,
                   "--checkpoint", str(trained / "model_00002.pt"), "--out", str(tmp_path / "out")]
        done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=100)
        if kilobytes < 3600:
            assert_refused(done, "File too large", "free disk space")
            assert not list(tmp_path.iterdir())
    assert done.returncode == 0 and (tmp_path / "out" / "config.json").exists(), done.stderr


def test_weights_without_a_tokenizer(byte_data, tmp_path):
    """Token ids of one's own: the export has no tokenizer, and says so; the weights come back."""
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=4))
    save_model(tmp_path / "bytes.pt", model, step=1, val_loss=None, tokenizer=None, train_config={})
    done = run("-m", "scripts.export", "--checkpoint", tmp_path / "bytes.pt", "--out", tmp_path / "deep" / "out")
    assert done.returncode == 0 and "no known tokenizer" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "deep" / "out" / "tokenizer.json").exists()
    back = checkpoint.load_checkpoint(tmp_path / "deep" / "out")
    assert back["tokenizer"] is None and torch.equal(back["model"]["wte.weight"], model.wte.weight)
    assert reference(tmp_path / "deep" / "out").config.eos_token_id is None


def test_another_models_tokenizer_is_not_taken_for_gpt2s(gpt2_folder, trained, tmp_path):
    """50,257 tokens alone do not make it GPT-2's vocabulary."""
    folder = tmp_path / "model"
    shutil.copytree(gpt2_folder, folder)
    assert checkpoint.load_checkpoint(folder)["tokenizer"] == "gpt2"  # without any tokenizer the size has to do
    words = Tokenizer().vocab()
    (folder / "vocab.json").write_text(json.dumps(words))
    assert checkpoint.load_checkpoint(folder)["tokenizer"] == "gpt2"
    (folder / "vocab.json").write_text(json.dumps(dict(zip(words, reversed(words.values()), strict=True))))
    assert checkpoint.load_checkpoint(folder)["tokenizer"] is None
    assert_refused(run("-m", "scripts.generate", "--checkpoint", folder), "no known tokenizer")
    (folder / "vocab.json").unlink()
    shutil.copy(trained / "hf" / "tokenizer.json", folder)
    assert checkpoint.load_checkpoint(folder)["tokenizer"] == "gpt2"


def edit(name, value):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
    return change


def weights(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return apply


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_with_code(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def pickled(content):
    def change(folder):
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")
    return change


def index_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "../outside.safetensors"}}')


class Evil:
    """A pickle that runs code when it is loaded by a careless program."""

    def __reduce__(self):
        return print, ("code was run",)


BAD = {
    "another activation": (edit("activation_function", "relu"), "activation_function 'relu'"),
    "exact GELU": (edit("activation_function", "gelu"), "activation_function 'gelu'"),
    "attention scaled by layer": (edit("scale_attn_by_inverse_layer_idx", True), "inverse_layer_idx True"),
    "unscaled attention": (edit("scale_attn_weights", False), "scale_attn_weights False"),
    "another epsilon": (edit("layer_norm_epsilon", 1e-6), "layer_norm_epsilon 1e-06"),
    "another width of the MLP": (edit("n_inner", 100), "n_inner 100"),
    "an LM head of its own": (edit("tie_word_embeddings", False), "tie_word_embeddings False"),
    "cross attention": (edit("add_cross_attention", True), "add_cross_attention True"),
    "quantized": (edit("quantization_config", {"bits": 4}), "quantization_config"),
    "another architecture": (edit("model_type", "llama"), "model_type 'llama'"),
    "layers that are not there": (edit("n_layer", 10**9), "the weights have 2"),
    "heads that do not divide": (edit("n_head", 5), "n_embd 24 is not divisible by n_head 5"),
    "a size in words": (edit("n_embd", "many"), "n_embd 'many'"),
    "another width": (edit("n_embd", 48), "size mismatch"),
    "more positions": (edit("n_positions", 64), "size mismatch"),
    "bidirectional attention": (edit("is_causal", False), "is_causal False"),
    "other heads by another name": (edit("num_attention_heads", 5), "n_embd 24 is not divisible by n_head 5"),
    "fewer positions than there are": (edit("n_positions", 32), "size mismatch"),
    "a head that is not the embedding": (
        weights(lambda t: t.update({"lm_head.weight": 2 * t["transformer.wte.weight"]})), "lm_head.weight"),
    "a weight under two names": (weights(lambda t: t.update({"wpe.weight": t["transformer.wpe.weight"] + 1})), "twice"),
    "deeper than JSON goes": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json"),
    "a vocabulary deeper than JSON goes": (lambda f: (f / "vocab.json").write_text('{"a":' * 100_000), "vocab.json"),
    "an index of a name too long": (lambda f: (
        (f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "x" * 5000}}))), "not an index"),
    "a number for a name": (pickled({5: torch.ones(2)}), "5 in"),
    "a tensor without data": (pickled({"wte.weight": torch.empty(3, 4, device="meta")}), "wte.weight"),
    "a sparse tensor": (pickled({"wte.weight": torch.eye(3).to_sparse()}), "wte.weight"),
    "a tensor larger than its data": (pickled({"wte.weight": torch.ones(1).half().expand(10**13)}), "larger than"),
    "a list of tensors": (pickled([torch.ones(2)]), "damaged"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "a JSON list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "cut weights": (cut, "damaged"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    "a huge header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "damaged"),
    "a missing weight": (weights(lambda t: t.pop("transformer.h.1.mlp.c_fc.bias")), "h.1.mlp.c_fc.bias"),
    "a weight too many": (weights(lambda t: t.update(score=torch.ones(2))), "score"),
    "not a number": (weights(lambda t: t["transformer.wpe.weight"].fill_(torch.nan)), "wpe.weight"),
    "whole numbers": (weights(lambda t: t.update({"transformer.ln_f.bias": torch.ones(24, dtype=torch.int8)})), "ln_f"),
    "matrices as nn.Linear has them": (
        weights(lambda t: t.update({n: m.t().contiguous() for n, m in t.items() if n.endswith("c_attn.weight")})),
        "size mismatch"),
    "a pickle with code": (pickle_with_code, "damaged"),
    "an index that leads outside": (index_outside, "which is not in that folder"),
    "an index of nothing": (lambda f: ((f / "model.safetensors").unlink(),
                                       (f / "model.safetensors.index.json").write_text("[]")), "not an index"),
    "a vocabulary that is none": (lambda f: (f / "vocab.json").write_text("[1]"), "vocab.json"),
}


def test_foreign_damaged_and_hostile_folders_are_refused_by_name(gpt2_folder, tmp_path, capsys):
    """Each with one clear line; nothing of them is run, or taken for what it is not."""
    for number, (case, (change, words)) in enumerate(BAD.items()):
        folder = tmp_path / str(number)
        shutil.copytree(gpt2_folder, folder)
        change(folder)
        try:
            checkpoint.load_checkpoint(folder)
        except UserError as refusal:
            error = str(refusal)
        else:
            raise AssertionError(f"{case} is accepted")
        assert words in error and "\n" not in error, (case, error)
        shutil.rmtree(folder)
    assert "code was run" not in capsys.readouterr().out


def test_names_that_transformers_also_knows(gpt2_folder, tmp_path):
    """A shape in the words of other models, and a head that is stored although it is the embedding."""
    config = json.loads((gpt2_folder / "config.json").read_text())
    for ours, other in (("n_positions", "max_position_embeddings"), ("n_layer", "num_hidden_layers"),
                        ("n_head", "num_attention_heads"), ("n_embd", "hidden_size")):
        config[other] = config.pop(ours)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(gpt2_folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})
    assert checkpoint.load_checkpoint(tmp_path)["config"] == checkpoint.load_checkpoint(gpt2_folder)["config"]
    with torch.no_grad():
        idx = torch.randint(50257, (2, 48))
        assert (GPT.from_pretrained(tmp_path)(idx) - reference(tmp_path)(idx).logits).abs().max() <= 1e-4


def test_another_kind_of_tokenizer_is_unknown_not_an_error(gpt2_folder, tmp_path):
    """A vocabulary with probabilities, say: the weights can be used all the same."""
    shutil.copytree(gpt2_folder, tmp_path / "model")
    for model in ({"type": "Unigram", "vocab": [["a", 0.0]]}, 3):
        (tmp_path / "model" / "tokenizer.json").write_text(json.dumps({"model": model}))
        assert checkpoint.load_checkpoint(tmp_path / "model")["tokenizer"] is None


@pytest.fixture
def hub(gpt2_folder):
    """A web server with what a download asks of the hub: its address. me/empty has no files, me/secret is gated."""
    files = {path.name: path.read_bytes() for path in gpt2_folder.iterdir()}
    revision = "0" * 40

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            path = self.path.split("?")[0]
            if path.startswith("/api/models/me/empty"):
                about = {"id": "me/empty", "sha": revision, "siblings": []}
                self.answer(200, b"[]" if "/tree/" in path else json.dumps(about).encode())
            elif path.startswith("/api/models/me/tiny/tree"):
                listing = [{"type": "file", "path": name, "size": len(content), "oid": revision}
                           for name, content in files.items()]
                self.answer(200, json.dumps(listing).encode())
            elif path.startswith("/api/models/me/tiny"):
                about = {"id": "me/tiny", "sha": revision, "siblings": [{"rfilename": name} for name in files]}
                self.answer(200, json.dumps(about).encode())
            elif path.startswith("/me/tiny") and (name := path.rsplit("/", 1)[-1]) in files:
                self.answer(200, files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"', X_Repo_Commit=revision)
            else:
                gated = "me/secret" in path
                self.answer(403 if gated else 404, b"{}", X_Error_Code="GatedRepo" if gated else "RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def answer(self, code, body, **headers):
            self.send_response(code)
            for name, value in ({"Content-Type": "application/json", "Content-Length": len(body)} | headers).items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_name_on_the_hub(hub, tmp_path):
    """Downloaded, kept for when there is no network; what is missing or gated is one line that says what to do."""
    def load(name, endpoint=hub):
        return Fork("-m", "scripts.generate", "--checkpoint", name, "--prompt", "A", "--max_new_tokens", "3",
                    HF_ENDPOINT=endpoint, HF_HOME=tmp_path).result()

    done = load("me/tiny")
    assert done.returncode == 0 and done.stdout.startswith("A"), done.stderr
    nobody = "http://127.0.0.1:9"
    assert load("me/tiny", nobody).stdout == done.stdout
    assert_refused(load("gpt2", nobody), "'gpt2'", "no connection", "a folder")
    empty = load("me/empty")  # the library shows its progress on the way
    assert empty.returncode == 2 and "error: 'me/empty' has no config.json" in empty.stderr, empty.stderr
    assert_refused(load("me/other"), "'me/other'", "it is not there", "a folder")
    assert_refused(load("me/secret"), "'me/secret'", "terms", "hf auth login")


def test_init_from_a_folder_fine_tunes_it(gpt2_folder, data_root, tmp_path):
    """The first loss is that of the foreign model, dropout and block_size are ours; the run resumes and exports."""
    words = ["-m", "scripts.train", "--config", "configs/finetune_shakespeare.yaml", "--init_from", gpt2_folder,
             "--data_root", data_root, "--log_dir", tmp_path, "--device", "cpu", "--seq_len", "16",
             "--micro_batch_size", "4", "--total_batch_size", "256", "--eval_tokens", "256", "--sample_every", "0",
             "--eval_every", "0", "--model.dropout", "0", "--model.block_size", "20"]
    done = run(*words, "--max_steps", "2", "--save_every", "1")
    assert done.returncode == 0, done.stderr
    first = checkpoint.load_checkpoint(tmp_path / "model_00000.pt")
    assert first["config"] | {"block_size": 48} == checkpoint.load_checkpoint(gpt2_folder)["config"] | {"dropout": 0.0}
    assert first["config"]["block_size"] == 20
    with torch.no_grad():
        idx = torch.randint(50257, (3, 20))
        expected = reference(gpt2_folder)(idx).logits
        assert (GPT.from_checkpoint(first)(idx) - expected).abs().max() <= 1e-4
    assert metrics(tmp_path, "train")[1]["loss"] < metrics(tmp_path, "train")[0]["loss"]
    assert "resuming from" in run(*words, "--max_steps", "3").stdout
    assert_refused(run(*words, "--max_steps", "4", "--model.block_size", "10"),
                   "block_size: checkpoint 20, requested 10")
    assert_refused(run(*words, "--log_dir", tmp_path / "new", "--model.block_size", "49"), "48 positions")


def test_validate_finds_agreement_and_difference(gpt2_folder, trained, tmp_path, capsys, monkeypatch):
    """Exit status 0 for a folder and for our checkpoint, 1 where one weight is another."""
    for model in (gpt2_folder, trained / "model_00002.pt"):
        done = run("-m", "scripts.validate", "--model", model, "--prompt", "Hello world")
        assert done.returncode == 0 and "they agree" in done.stdout, done.stdout + done.stderr
        assert done.stdout.count("Hello world") == 2 and done.stdout.count("%") == 10
    folder = tmp_path / "with_settings"
    shutil.copytree(gpt2_folder, folder)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.5, "do_sample": true}')
    assert validate.main(validate.ValidateConfig(model=str(folder), top=10**6)) == 0
    content = checkpoint.load_checkpoint(gpt2_folder)
    content["model"]["h.1.mlp.c_fc.bias"][3] += 0.1
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda source: content)
    assert validate.main(validate.ValidateConfig(model=str(gpt2_folder))) == 1
    assert "they DISAGREE" in capsys.readouterr().out


def test_loading_needs_little_more_memory_than_the_weights(tmp_path):
    """At most 1.2 times, for safetensors and for pickles: no second model is built."""
    from benchmarks.checkpoint import measure_load

    with torch.device("meta"):
        shape = GPTConfig(n_layer=4)
        weights = {name: torch.empty(tensor.shape, device="cpu").normal_() for name, tensor in
                   GPT(shape).state_dict().items()}
    pretrained.save({"model": weights, "config": vars(shape), "tokenizer": None}, tmp_path)
    _, peak, size = measure_load(tmp_path)
    assert size == 4 * GPT.from_pretrained(tmp_path).num_parameters()
    assert peak <= 1.2 * size + 30e6  # tiktoken's tables and what Python loads on the way
