"""A composition on a MODEL: what it carries, and what lives while it samples."""
