"""BaFT: basis-level representation fine-tuning (Liu et al., ICLR 2025); first public implementation, from the paper's text.

    Φ(h) = h + Rᵀ W(h) (A h + b − R h),   W(h) = diag(w_1(h) … w_r(h)),   loss = L_task + R_bal + R_loc

Where the paper is silent the choice made here is a field of `BaFT`, described there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from errata.contrast.names import COUNT
from errata.methods.subspace.editor import SubspaceEditor
from errata.methods.subspace.locality import balance_term, locality_term
from errata.methods.subspace.other_facts import MOST
from errata.methods.subspace.presets import BAFT, BAFT_TUNES
from errata.methods.subspace.training import Training
from errata.request import EditRequest

_SUBJECT_DEPTHS = (6 / 30,)  # where the subject's last token knows the whole name and later blocks still read it (docs/results)
# Where the states of a prompt's last tokens know whom they are about; an earlier gate there cannot tell neighbours apart.
_ANSWER_DEPTHS = (14 / 30, 18 / 30, 22 / 30, 26 / 30)


@dataclass(frozen=True)
class BaFT(SubspaceEditor):
    """Fields beside those of `SubspaceEditor`:

    gate        which logistic regression (see `errata.methods.subspace.op`); "subspace" is the ablation ss-w
    gate_start  "ridge": where it is known what should stay, gates begin at `errata.methods.subspace.gate_start`; "random": as pyreft's
    opens       where a gate is to open: "subject": on the last token of the subject wherever a text names it, and on no other, so the
                answer is found however it is asked for; "answer", as the paper: on the last prompt tokens and the output.  A request
                without a subject has "answer".  Each has blocks of its own by default, an early one and four later ones
    train_gates
                False: gates at the subject stay as solved, R_bal and R_loc (of gates alone) rest; gates at the answer always train
    threshold   a gate weight below it is exactly 0; a text on which every gate is shut is answered by the base, bit for bit
    other_facts, other_facts_weight, other_facts_batch
                prompts about the subject's other facts (`errata.methods.subspace.other_facts`), the weight of the output term on them,
                and how many of them a step takes; with ``opens="subject"`` only
    balance     incremental load balancing R_bal = Σ_k (w̄_k − w̄)² / ((r − 1) w̄), averaged over blocks; w̄_k runs over this patch's and
                all past samples, a request each (their sums are kept in the patch).  ``squared_cv``: divide by w̄² (what the text calls it)
    locality    use R_loc where requests bring ``unrelated`` or ``contrast`` texts: w ≤ alpha there, w ≥ beta on the edit, largest weights
                gamma apart
    alpha, beta, gamma
                the three margins of R_loc
    rescale     "none": opening and shutting pull alike, so that of two names with like states the edited one's gate opens; "margin":
                each hinge is divided by its margin, so that at alpha = 0.01 shutting pulls 50 times as much; "max", as the paper may be
                read: each active one is scaled to the largest (stop-gradient), so that its gradient grows as 1/hinge
    contrast    neighbours that R_loc acts on for a request that brings no ``unrelated`` and names its subject (`errata.contrast`)

    The defaults are errata's; the preset "published" is what the paper states.  What differs, and why, is in docs/results.
    """

    name: ClassVar[str] = "baft"
    paper: ClassVar[str] = "Liu et al., ICLR 2025 (BaFT)"
    needs: ClassVar[frozenset[str]] = frozenset({"unrelated?"})  # used where given
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = BAFT
    TUNES: ClassVar[dict[str, Any]] = BAFT_TUNES

    depths: tuple[float, ...] | None = None
    lr: float = 1e-3
    steps: int = 60
    batched_lr: float = 1e-3
    stop: float = 0.05
    stop_on: Literal["mean", "sum", "total"] = "total"
    weight_decay: float = 2.0
    init: Literal["pyreft", "identity"] = "identity"
    gate: Literal["shared_logit", "rmsnorm", "subspace"] = "rmsnorm"
    gate_start: Literal["random", "ridge"] = "ridge"
    opens: Literal["subject", "answer"] = "subject"
    train_gates: bool = False
    threshold: float = 0.1
    other_facts: int = MOST
    other_facts_weight: float = 0.3
    other_facts_batch: int = 1
    balance: bool = True
    squared_cv: bool = False
    locality: bool = True
    alpha: float = 0.05
    beta: float = 0.5
    gamma: float = 0.4
    rescale: Literal["max", "margin", "none"] = "none"
    prefixes: int = 4
    resume: bool = False
    contrast: int = COUNT
    contrast_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.opens == "answer" or self.ridge,
            'opens="subject" needs gate="rmsnorm" and gate_start="ridge"; set opens="answer" beside others',
        )
        stands = not (self.at_subject and self.resume)
        self.require(
            stands, 'an edit with opens="subject" stands by itself; set resume=false, or opens="answer" to go on from the last patch'
        )
        self.require(0 <= self.threshold < 1, f"threshold is a gate weight, from 0 to below 1, not {self.threshold:g}")
        self.require(0 <= self.other_facts <= MOST, f"other_facts must be from 0 to {MOST}, not {self.other_facts}")
        others = min(self.other_facts_weight, self.other_facts_batch)
        self.require(others >= 0, "other_facts_weight and other_facts_batch must not be negative")
        self.require(min(self.alpha, self.beta, self.gamma) >= 0, "alpha, beta and gamma must not be negative")

    @property
    def at_subject(self) -> bool:  # type: ignore[override]
        return self.opens == "subject"

    @property
    def own_depths(self) -> tuple[float, ...]:
        return _SUBJECT_DEPTHS if self.at_subject else _ANSWER_DEPTHS

    @property
    def op_settings(self) -> dict[str, Any]:
        return super().op_settings | ({"threshold": self.threshold} if self.threshold else {})

    def suited(self, requests: Sequence[EditRequest]) -> Self:
        """Without a subject there is nothing that a gate could open at: then it opens where the answer is given."""
        if self.at_subject and any(r.subject is None for r in requests):
            return replace(self, opens="answer")
        return self

    @property
    def gate_kind(self) -> str:  # type: ignore[override]
        return self.gate

    @property
    def ridge(self) -> bool:  # type: ignore[override]
        return self.gate == "rmsnorm" and self.gate_start == "ridge"

    @property
    def keeps_gates(self) -> bool:
        return self.at_subject and not self.train_gates

    def regularise(self, training: Training, p: Mapping[int, Mapping[str, Tensor]], gates: Mapping[int, Tensor], alive: Tensor) -> Tensor:  # type: ignore[override]
        """R_bal + R_loc of each running problem, [e], averaged over blocks."""
        total = torch.zeros(len(alive), device=alive.device)
        if self.keeps_gates:
            return total
        blocks = list(gates)
        if self.balance and self.gate != "subspace":
            total = total + sum(balance_term(self, training, b, alive) for b in blocks) / len(blocks)
        states = training.irrelevant_states() if self.locality else None
        if states is not None:
            total = total + sum(locality_term(self, training, p[b], b, gates[b], states, alive) for b in blocks) / len(blocks)
        return total
