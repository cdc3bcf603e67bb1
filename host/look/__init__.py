"""Pictures and figures of LoRAs and runs."""
