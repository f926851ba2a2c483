"""The Discord bot: asks users for their consent, and lets them keep their keys."""
