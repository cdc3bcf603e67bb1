"""The rooms that import comfy: LoRA files to bank, wrappers, memory accounting."""
