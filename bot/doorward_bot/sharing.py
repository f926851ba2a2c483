"""`/sharing`: what a user shares with whom. Imports `commands` and below."""

import disnake
from disnake.ext import commands

from doorward.keybroker.v1 import keybroker_service_pb2 as pb
from doorward_bot import messages
from doorward_bot.commands import EVERYWHERE, Commands, Interaction, matching, parse_id

_RECENT = 100


class Sharing(Commands):
    """List, revoke, block."""

    @commands.slash_command(name="sharing", **EVERYWHERE)
    async def sharing(self, inter: Interaction) -> None:
        """What you share, and with whom."""

    @sharing.sub_command(name="list")
    async def list_(self, inter: Interaction) -> None:
        """Show which keys you share with whom."""
        await inter.response.defer(ephemeral=True)
        answer = await self._ask(inter, "ListGrants", pb.ListGrantsRequest(discord_user_id=str(inter.author.id)))
        if answer is not None:
            lines = [f"- {messages.grant_line(grant)}" for grant in answer.grants]
            await self._tell(inter, messages.listed(lines) or messages.NO_GRANTS)

    @sharing.sub_command(name="revoke")
    async def revoke(self, inter: Interaction, grant: str) -> None:
        """Stop sharing: what was not sent yet is not sent any more.

        Parameters
        ----------
        grant: What to stop sharing
        """
        await inter.response.defer(ephemeral=True)
        request = pb.RevokeGrantRequest(discord_user_id=str(inter.author.id), grant_id=parse_id(grant))
        if await self._ask(inter, "RevokeGrant", request) is not None:
            await self._tell(inter, messages.REVOKED)

    @revoke.autocomplete("grant")
    async def complete_grant(self, inter: Interaction, typed: str) -> list[disnake.OptionChoice]:
        """The user's grants."""
        answer = await self._choices("ListGrants", pb.ListGrantsRequest(discord_user_id=str(inter.author.id)))
        grants = answer.grants if answer is not None else ()
        return matching(((messages.grant_choice(grant), grant.id) for grant in grants), typed)

    @sharing.sub_command(name="block")
    async def block(self, inter: Interaction, application: str) -> None:
        """Keep an application from asking you again; what it asks now is canceled.

        Parameters
        ----------
        application: Which one, of those that asked you
        """
        await inter.response.defer(ephemeral=True)
        request = pb.BlockApplicationRequest(discord_user_id=str(inter.author.id), request_id=parse_id(application))
        if await self._ask(inter, "BlockApplication", request) is None:
            return
        canceled = pb.ResolveConsentRequestRequest(request_id=request.request_id, canceled=pb.Canceled())
        if await self._ask(inter, "ResolveConsentRequest", canceled) is not None:
            await self._tell(inter, messages.BLOCKED)

    @block.autocomplete("application")
    async def complete_application(self, inter: Interaction, typed: str) -> list[disnake.OptionChoice]:
        """Who asked the user lately, each once."""
        request = pb.ListConsentRequestsRequest(discord_user_id=str(inter.author.id), max_requests=_RECENT)
        answer = await self._choices("ListConsentRequests", request)
        requests = [leased.request for leased in answer.requests] if answer is not None else []
        latest = {messages.application_choice(one): one.id for one in reversed(requests)}
        return matching(reversed(latest.items()), typed)
