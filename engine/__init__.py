"""The bank of adapters and the routed forwards. Knows torch modules and the kernels; knows nothing of the host."""
