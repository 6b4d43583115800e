"""GPT-2: model, data, training and sampling. The commands that use it are in scripts/."""
