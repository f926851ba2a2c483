"""What things look like on the wire: pure functions from the state to Discord's JSON."""

from datetime import datetime

from .errors import Json
from .state import (
    APPLICATION_ID,
    COMPONENT,
    EPHEMERAL,
    GUILD_ID,
    LOADING,
    MODAL,
    Channel,
    Interaction,
    Message,
    User,
    World,
)

# Discord's bits: everything, as a DM allows it.
PERMISSIONS = str((1 << 53) - 1)
SIZE_LIMIT = 10 << 20
GUILD_CONTEXT, DM_CONTEXT = 0, 1
MESSAGE_ANSWER, UPDATE_ANSWER = 4, 7


def timestamp(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")


def user(someone: User) -> Json:
    shown: Json = {
        "id": someone.id,
        "username": someone.name,
        "discriminator": "0",
        "global_name": None if someone.bot else someone.name.capitalize(),
        "avatar": None,
        "banner": None,
        "accent_color": None,
        "public_flags": 0,
        "flags": 0,
        "avatar_decoration_data": None,
        "collectibles": None,
        "primary_guild": None,
    }
    return shown | ({"bot": True} if someone.bot else {})


def own_user(bot: User) -> Json:
    return user(bot) | {"mfa_enabled": False, "locale": "en-US", "verified": True, "email": None}


def member(someone: User) -> Json:
    return {
        "user": user(someone),
        "roles": [],
        "joined_at": "2020-01-01T00:00:00.000000+00:00",
        "premium_since": None,
        "communication_disabled_until": None,
        "pending": False,
        "nick": None,
        "avatar": None,
        "banner": None,
        "mute": False,
        "deaf": False,
        "flags": 0,
        "permissions": PERMISSIONS,
    }


def channel(place: Channel, last_message_id: str | None = None) -> Json:
    if place.recipient is None:
        return {
            "id": place.id,
            "type": 0,
            "guild_id": GUILD_ID,
            "name": "general",
            "position": 0,
            "flags": 0,
            "permissions": PERMISSIONS,
            "last_message_id": last_message_id,
        }
    return {
        "id": place.id,
        "type": 1,
        "flags": 0,
        "last_message_id": last_message_id,
        "recipients": [user(place.recipient)],
    }


def message(world: World, shown: Message, *, nested: bool = False) -> Json:
    """As REST answers it; `nested`: within another, which ends there."""
    body: Json = {
        "id": shown.id,
        "channel_id": shown.channel.id,
        "type": shown.type,
        "author": user(shown.author),
        "content": shown.content,
        "embeds": shown.embeds,
        "components": shown.components,
        "flags": shown.flags,
        "timestamp": timestamp(shown.timestamp),
        "edited_timestamp": timestamp(shown.edited) if shown.edited else None,
        "attachments": [],
        "mentions": [user(someone) for someone in world.users.values() if f"<@{someone.id}>" in shown.pings],
        "mention_roles": [ping[3:-1] for ping in shown.pings if ping.startswith("<@&")],
        "mention_everyone": bool({"@everyone", "@here"} & set(shown.pings)),
        "pinned": False,
        "tts": False,
    }
    if shown.nonce is not None:
        body["nonce"] = shown.nonce
    if shown.reply_to is not None:
        body["message_reference"] = {"type": 0, "channel_id": shown.channel.id, "message_id": shown.reply_to.id}
    if shown.reply_to is not None and not nested:
        gone = shown.reply_to.deleted
        body["referenced_message"] = None if gone else message(world, shown.reply_to, nested=True)
    if shown.interaction is not None:
        body |= {"webhook_id": APPLICATION_ID, "application_id": APPLICATION_ID}
        body["interaction_metadata"] = _metadata(shown.interaction)
    return body


def _metadata(interaction: Interaction) -> Json:
    shown: Json = {
        "id": interaction.id,
        "type": interaction.type,
        "user": user(interaction.user),
        "authorizing_integration_owners": _owners(interaction),
    }
    if interaction.type == COMPONENT and interaction.message is not None:
        shown["interacted_message_id"] = interaction.message.id
    if interaction.type == MODAL and interaction.parent is not None:
        shown["triggering_interaction_metadata"] = _metadata(interaction.parent)
    return shown


def _owners(interaction: Interaction) -> dict[str, str]:
    """Whose installation it came by: the guild's, of which a DM knows no more than that."""
    return {"0": "0" if interaction.channel.recipient else GUILD_ID}


def interaction_event(world: World, shown: Interaction) -> Json:
    """INTERACTION_CREATE's."""
    event: Json = {
        "id": shown.id,
        "application_id": APPLICATION_ID,
        "type": shown.type,
        "data": shown.data,
        "channel": channel(shown.channel),
        "channel_id": shown.channel.id,
        "token": shown.token,
        "version": 1,
        "locale": "en-US",
        "app_permissions": PERMISSIONS,
        "entitlements": [],
        "authorizing_integration_owners": _owners(shown),
        "context": DM_CONTEXT if shown.channel.recipient else GUILD_CONTEXT,
        "attachment_size_limit": SIZE_LIMIT,
    }
    if shown.message is not None:
        event["message"] = message(world, shown.message)
    if shown.channel.recipient is not None:
        return event | {"user": user(shown.user)}
    return event | {
        "member": member(shown.user),
        "guild_id": GUILD_ID,
        "guild": {"id": GUILD_ID, "locale": "en-US", "features": []},
        "guild_locale": "en-US",
    }


def interaction_callback(world: World, shown: Interaction) -> Json:
    """The answer to a callback `with_response`."""
    body: Json = {"id": shown.id, "type": shown.type, "channel_id": shown.channel.id}
    if shown.channel.recipient is None:
        body["guild_id"] = GUILD_ID
    if shown.original is None:
        return {"interaction": body}
    body |= {
        "response_message_id": shown.original.id,
        "response_message_loading": bool(shown.original.flags & LOADING),
        "response_message_ephemeral": bool(shown.original.flags & EPHEMERAL),
    }
    if shown.response_type not in (MESSAGE_ANSWER, UPDATE_ANSWER):
        return {"interaction": body}
    return {
        "interaction": body,
        "resource": {"type": shown.response_type, "message": message(world, shown.original)},
    }


def guild(world: World) -> Json:
    """GUILD_CREATE's, with its one channel."""
    everyone: Json = {
        "id": GUILD_ID,
        "name": "@everyone",
        "color": 0,
        "colors": {"primary_color": 0, "secondary_color": None, "tertiary_color": None},
        "hoist": False,
        "icon": None,
        "unicode_emoji": None,
        "position": 0,
        "permissions": PERMISSIONS,
        "managed": False,
        "mentionable": False,
        "flags": 0,
    }
    shown: Json = {
        "id": GUILD_ID,
        "name": "Sandbox",
        "icon": None,
        "splash": None,
        "discovery_splash": None,
        "owner_id": next(iter(world.users), APPLICATION_ID),
        "afk_channel_id": None,
        "afk_timeout": 300,
        "verification_level": 0,
        "default_message_notifications": 0,
        "explicit_content_filter": 0,
        "roles": [everyone],
        "emojis": [],
        "features": [],
        "mfa_level": 0,
        "application_id": None,
        "system_channel_id": None,
        "system_channel_flags": 0,
        "rules_channel_id": None,
        "vanity_url_code": None,
        "description": None,
        "banner": None,
        "premium_tier": 0,
        "preferred_locale": "en-US",
        "public_updates_channel_id": None,
        "nsfw_level": 0,
        "stickers": [],
        "premium_progress_bar_enabled": False,
        "safety_alerts_channel_id": None,
    }
    return shown | {
        "joined_at": "2020-01-01T00:00:00.000000+00:00",
        "large": False,
        "unavailable": False,
        "member_count": len(world.users) + 1,
        "members": [member(world.bot)],
        "channels": [channel(world.guild_channel)],
        "threads": [],
        "presences": [],
        "voice_states": [],
        "stage_instances": [],
        "guild_scheduled_events": [],
        "soundboard_sounds": [],
    }


def application(world: World) -> Json:
    """The bot's own, as /oauth2/applications/@me has it."""
    owner = next(iter(world.users.values()), world.bot)
    return {
        "id": APPLICATION_ID,
        "name": world.bot.name,
        "icon": None,
        "description": "",
        "type": None,
        "bot": user(world.bot),
        "bot_public": False,
        "bot_require_code_grant": False,
        "verify_key": "0" * 64,
        "flags": 0,
        "flags_new": "0",
        "redirect_uris": [],
        "interactions_endpoint_url": None,
        "role_connections_verification_url": None,
        "owner": user(owner),
        "approximate_guild_count": int(world.settings.guild),
        "approximate_user_install_count": 0,
        "approximate_user_authorization_count": 0,
        "explicit_content_filter": 0,
        "team": None,
        "eligible_oauth2_scopes": [],
    }
