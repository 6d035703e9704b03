"""`LM`: a frozen base with its tokenizer and family; stacks of patches on and off, by row; logits and generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from errata import registry
from errata.core import decode, experts, offload, passes, window
from errata.core.bank import Plan, Stack, compile_plan
from errata.core.bare import check_bare, tell_on_saving
from errata.core.families import Family, find, has_linear, resolve, text_config
from errata.core.fingerprints import fingerprint
from errata.core.hooks import Hooks
from errata.core.patch import POINTS, Patch, Site
from errata.core.patch_card import name_base
from errata.core.roles import Roles, find_roles
from errata.core.sites import site_sizes
from errata.core.tokens import Batch, Encoded, encode, pad, pad_id
from errata.errors import ModelError, PatchError

STOPS = (".", "\n")
TOKENS, CHAT_TOKENS = 12, 64  # of an answer at most, where a caller does not say


class LM:
    """A causal language model that is never written.

    ``hf`` is put in evaluation mode and its parameters are marked as not trainable; nothing else of it is touched.
    """

    def __init__(self, hf: Any, tokenizer: Any, name: str = "") -> None:
        check_bare(hf)
        self.hf, self.tokenizer, self.name = hf.eval().requires_grad_(False), tokenizer, name
        self.family: Family = find(hf)
        self.config = text_config(hf.config)
        self.find_blocks()
        self._attached: Stack = ()
        self._hooks: Hooks | None = None
        self._where: torch.device | None = None  # the device of what the hooks hold
        self._fingerprint: str | None = None
        self.base_cache: dict[Any, Any] = {}  # what was found out about the frozen base and costs time: functions of it and the key alone

    def find_blocks(self) -> None:
        """Look the blocks up in ``hf``."""
        self.blocks = resolve(self.hf, self.family.blocks)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def nearest_block(self, block: int) -> int:
        """The block, or the nearest one that text alone runs, of two the lower (Mllama has blocks that run beside an image only)."""
        return min((b for b in range(self.depth) if b not in self.family.idle), key=lambda b: abs(b - block))

    @property
    def roles(self) -> Roles:
        """What writes to the residual stream in each block, as trials found it; they run when they are first asked for."""
        if "roles" not in self.base_cache:
            self.base_cache["roles"] = find_roles(self.hf, self.family)
        found: Roles = self.base_cache["roles"]
        return found

    def linear_path(self, site: Site) -> str:
        """Path inside its block of the linear, or the experts, that a site names; `ModelError` where the block has no such part."""
        if site.point == experts.POINT:
            return self.roles.experts(site.block)
        if site.point not in POINTS:
            return site.point
        known = getattr(self.family, site.point)
        return known if known and has_linear(self.blocks[site.block], known) else self.roles.path(site.block, site.point)

    def mlp_site(self, block: int) -> Site:
        """Where the block's MLP writes: its last linear, or else its fused experts."""
        try:
            self.linear_path(Site(block, "mlp_down"))
        except ModelError:
            site = Site(block, experts.POINT)
            with contextlib.suppress(ModelError):
                experts.sizes(self.module(site))
                return site
            raise
        return Site(block, "mlp_down")

    def module(self, site: Site) -> Any:
        """The module a site names."""
        block = self.blocks[site.block]
        return block if site.point == "block" else resolve(block, self.linear_path(site))

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @property
    def context_length(self) -> int | None:
        """Positions a text may have; None where the config names no limit."""
        most = getattr(self.config, "max_position_embeddings", None)
        return most if isinstance(most, int) else None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return offload.device(self.hf)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype hidden states have."""
        dtype: torch.dtype = self.hf.get_input_embeddings().weight.dtype
        return dtype

    @property
    def fingerprint(self) -> str:
        """Names the base: a patch fits a model with this fingerprint."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.hf)
            name_base(self._fingerprint, self.name)
        return self._fingerprint

    # -- stacks ------------------------------------------------------------------------------------------------

    @property
    def stack(self) -> Stack:
        """The patches attached now, in order."""
        return self._attached

    def check(self, patch: Patch) -> None:
        """`PatchError` unless the patch is whole (`Patch.check`), belongs to this model and fits its sites."""
        if patch.base != self.fingerprint:
            raise PatchError(
                f"patch {patch.id} was made for base {patch.base}, this model is {self.fingerprint}; load the model it was made for"
            )
        for op, sizes in zip(patch.ops, patch.check(), strict=True):
            if wrong := registry.get("op", op.kind).schema.wrong_on(op, sizes, self.check_site(op.site), self):
                raise PatchError(f"patch {patch.id}: the {op.kind!r} op {op.place}: {wrong}; make the edit again")

    def check_site(self, site: Site) -> tuple[int, int]:
        """Sizes of what goes into and comes out of a site; `PatchError` for one that this model does not have."""
        return site_sizes(self, site)

    def attach(self, *patches: Patch) -> None:
        """Put patches on top of what is attached; they stay until `detach`."""
        self._set(self._on_top(patches))

    def detach(self, *ids: str) -> None:
        """Take patches off by id (all of them when none is named).  The base is as before, bit for bit."""
        for missing in [i for i in ids if all(p.id != i for p in self._attached)]:
            raise PatchError(f"patch {missing} is not attached; attached are {[p.id for p in self._attached]}")
        self._set(tuple(p for p in self._attached if ids and p.id not in ids))

    def _on_top(self, patches: Stack) -> Stack:
        """What is attached with ``patches`` on top, checked."""
        for i, patch in enumerate(patches):
            self.check(patch)
            if any(p.id == patch.id for p in (*self._attached, *patches[:i])):
                raise PatchError(f"patch {patch.id} is attached already")
        return (*self._attached, *patches)

    def _set(self, stack: Stack) -> None:
        """Compile first, swap after: where it fails, what was attached still is."""
        before, compiled = self._hooks, self._compiled(stack)
        self._attached, self._hooks, self._where = compiled
        if before is not None:
            before.close()
        tell_on_saving(self.hf, bool(stack))

    def _compiled(self, stack: Stack) -> tuple[Stack, Hooks | None, torch.device]:
        """(the stack, its hooks, where they compute)."""
        device = self.device
        plan = compile_plan([stack], None, device, self.tokenizer) if stack else None
        return stack, None if plan is None else Hooks(self.hf, self.family, self.module, plan), device

    @contextmanager
    def under(self, *patches: Patch) -> Iterator[LM]:
        """Patches on for the length of a ``with`` block, on top of what is attached."""
        before, hooks = (self._attached, self._hooks, self._where), self._hooks
        compiled = self._compiled(self._on_top(patches))
        if hooks is not None:
            hooks.plan.enabled = False  # they stay on the model: nothing has to be made again at the end
        self._attached, self._hooks, self._where = compiled
        try:
            yield self
        finally:
            if self._hooks is not None:
                self._hooks.close()
            self._attached, self._hooks, self._where = before
            if hooks is not None:
                hooks.plan.enabled = True

    @contextmanager
    def prompt_ends(self, lengths: Sequence[int]) -> Iterator[LM]:
        """Inside, calls of ``hf`` under what is attached are of texts whose prompts have so many tokens, a number a row, without padding.

        For callers of the bare model whose rows go on behind their prompts, or whose prompts come in pieces.
        """
        plan = None if self._hooks is None else self._hooks.plan
        if plan is not None:
            plan.prompt_lengths = torch.tensor(list(lengths), device=self.device)
        try:
            yield self
        finally:
            if plan is not None:
                plan.prompt_lengths = None

    @contextmanager
    def running(self, plan: Plan) -> Iterator[Plan]:
        """Run under exactly this plan; what is attached stands aside meanwhile."""
        attached = self._hooks.plan if self._hooks is not None else None
        if attached is not None:
            attached.enabled = False
        try:
            with Hooks(self.hf, self.family, self.module, plan):
                yield plan
        finally:
            if attached is not None:
                attached.enabled = True

    def plan(self, stacks: Sequence[Stack] | None, rows: Sequence[int] | Tensor | None, count: int) -> Plan:
        """A plan for ``count`` rows.  ``stacks`` None means what is attached; ``rows`` names each row's stack."""
        if stacks is None:
            return self._attached_plan()
        if rows is None and len(stacks) == count:
            rows = range(count)
        elif rows is None and len(stacks) != 1:
            raise ModelError(f"{len(stacks)} stacks for {count} rows; say with rows= which row runs under which stack")
        for patch in {p.id: p for stack in stacks for p in stack}.values():
            self.check(patch)
        index = None if rows is None else torch.as_tensor(list(rows) if not isinstance(rows, Tensor) else rows)
        if index is not None and (len(index) != count or not bool(((index >= 0) & (index < len(stacks))).all())):
            raise ModelError(f"rows must name one of {len(stacks)} stacks for each of {count} rows")
        return compile_plan(list(stacks), index, self.device, self.tokenizer)

    def _attached_plan(self) -> Plan:
        """What is attached, with the banks that were compiled then: writing a patch out can take longer than a short answer."""
        if self._hooks is None:
            return Plan()
        if self._where != self.device:  # the model was moved since
            self._set(self._attached)
        own = self._hooks.plan
        inserter = own.inserter and replace(own.inserter, placed=None, keep=None)
        return Plan({site: list(banks) for site, banks in own.banks.items()}, inserter=inserter)

    # -- running -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, batch: Batch, stacks: Sequence[Stack] | None = None, rows: Sequence[int] | Tensor | None = None) -> Tensor:
        """[B, T, V] of a padded batch (either side), each row under its own stack."""
        batch = batch.to(self.device)
        plan = self.plan(stacks, rows, len(batch.ids))
        plan.prompt_lengths = batch.prompt_lengths
        with self.running(plan):
            out: Tensor = self.forward(batch.ids, batch.mask).logits
        return out

    def forward(self, ids: Tensor, mask: Tensor, **more: Any) -> Any:
        """The model's own forward with positions counted from each row's first real token.

        ``past_key_values`` is what the call before gave back under this name, whatever the model keeps.  `WindowError` where a text is
        longer than the model's window: its positions would not be there, or never have been trained.
        """
        window.check_mask(self, mask)
        return passes.forward(self, ids, mask, **more)

    def encode(self, prompts: Sequence[str], targets: Sequence[str] | None = None, *, chat: bool = False) -> list[Encoded]:
        """`errata.core.tokens.encode`; `WindowError` for a text that is longer than the model's window, which is never cut."""
        window.bound(self, prompts, targets)
        return window.checked(self, encode(self.tokenizer, prompts, targets, chat=chat), prompts)

    def batch(self, rows: Sequence[Encoded], side: str = "left") -> Batch:
        return pad(rows, pad_id(self.tokenizer), side)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        stacks: Sequence[Stack] | None = None,
        rows: Sequence[int] | Tensor | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        chat: bool = False,
        top_k: int | None = None,
        seed: int = 0,
    ) -> list[str]:
        """What `generate_ids` says, as texts up to the first ``stop``."""
        stop = _stops(stop, chat)
        found = self.generate_ids(
            prompts, stacks=stacks, rows=rows, max_new_tokens=max_new_tokens, stop=stop, chat=chat, top_k=top_k, seed=seed
        )
        return [decode.detokenize(self.tokenizer, ids, stop) for ids in found]

    @torch.no_grad()
    def generate_ids(
        self,
        prompts: Sequence[str],
        *,
        stacks: Sequence[Stack] | None = None,
        rows: Sequence[int] | Tensor | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        chat: bool = False,
        top_k: int | None = None,
        seed: int = 0,
    ) -> list[list[int]]:
        """New token ids, each row under its own stack; a row ends before EOS or with the token that completes a ``stop`` text.

        ``chat``: the prompts are asked in the chat template.  ``max_new_tokens`` None: 12, in a chat 64.  ``stop`` None: the first
        sentence or line, in a chat nothing but the end of the turn.
        Greedy, or sampled from the ``top_k`` likeliest tokens: a row's draws depend on ``seed``, its prompt and how often that
        prompt stood before it, not on the other rows.
        """
        if not prompts:
            return []
        batch = self.batch(self.encode(prompts, chat=chat)).to(self.device)
        limit = (CHAT_TOKENS if chat else TOKENS) if max_new_tokens is None else max_new_tokens
        prefilled = decode.PrefilledBatch.prefill(self, batch, self.plan(stacks, rows, len(prompts)))
        return decode.decode(prefilled, limit, _stops(stop, chat), None if top_k is None else decode.Sampler(prompts, top_k, seed))

    @property
    def last_logits_kwargs(self) -> dict[str, Any]:
        """The keyword that makes the head run on the last position only, where the model has one."""
        return {"logits_to_keep": 1} if self.accepts("logits_to_keep") else {}

    def accepts(self, keyword: str) -> bool:
        import inspect

        return keyword in inspect.signature(type(self.hf).forward).parameters

    def complete(self, prompt: str, **how: Any) -> str:
        """The prompt's greedy continuation under what is attached; it takes the arguments of `generate`."""
        return self.generate([prompt], **how)[0]


def _stops(stop: Sequence[str] | None, chat: bool) -> Sequence[str]:
    """Texts that end an answer, where a caller does not say: a chat model ends its turn itself."""
    return (() if chat else STOPS) if stop is None else stop
