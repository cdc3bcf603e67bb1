"""LoRA files: found through ComfyUI's folders, checked, and made into what the engine's bank takes."""
