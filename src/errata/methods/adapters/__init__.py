"""LoRA and AdaLoRA: low-rank branches beside linears, trained on the target."""
