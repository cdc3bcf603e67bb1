"""The second body: a small transformer with joint attention, in a world where two characters may share a picture."""
