"""The embedded default: a small trained diffusion model, its LoRAs, its judge and a sampler that needs no ComfyUI."""
