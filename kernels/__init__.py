"""Pure tensor functions. Imports torch only."""
