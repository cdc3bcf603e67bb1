"""What the model families of ComfyUI do with rows and tokens, and where they can be cut."""
