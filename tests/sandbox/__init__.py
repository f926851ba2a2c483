"""A stand-in OAuth 2 provider, to link accounts with when no real provider may be asked."""
