"""A stand-in for Discord that speaks its protocol: REST and Gateway version 10, strict, in a process of its own.

It plays what a bot in DMs and a guild's slash commands need. It does not play files, polls, stickers, reactions,
threads, Components V2, menus but those of strings, commands but those with a slash, user-installed applications,
sharding, compression but zlib-stream, and the limits of single routes; what it does not play it refuses and records.

`client` is for tests; `actors` says what people can do, `checks` what a bot may send, `faults` what may go wrong.
"""
