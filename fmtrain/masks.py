"""What a recipe names and a checkpoint records: a policy, perhaps in its light form; and what it
allows on a layout.

    Mask.parse("v2v+merge", prefix=1, kernel_size=3)

A mask in its light form attends to nothing ahead: the pairs that its policy reveals are pooled into
the first positions (`fmtrain.merge`). Shape names: B rows, Q queries, K keys, T tokens. Queries are
the last Q of the K tokens; the ones before them are in a cache.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from enum import IntEnum
from itertools import product

import torch

from fmtrain import policies
from fmtrain.command_line import nearest
from fmtrain.layout import Layout, Role
from fmtrain.merge import Merge
from fmtrain.policies import POLICIES, Policy, get_policy

# Of the mask definitions; changes when a policy, or merge, comes to mean something else.
VERSION = 1
LIGHT = "+merge"  # behind the name of a policy: its light form


@dataclass(frozen=True)
class Mask:
    """A policy and, for its light form, how it pools.

    Raises `ValueError` for the light form of a policy that reveals nothing.
    """

    policy: Policy
    merge: Merge | None = None

    def __post_init__(self):
        if self.merge is not None and not self.policy.reveals:
            raise ValueError(
                f"policy {self.policy.name!r} reveals nothing, so there is nothing to merge; "
                "drop merge or take another policy"
            )

    @classmethod
    def parse(cls, name: str, **options) -> "Mask":
        """The mask called `name`: a policy, or POLICY+merge with the options of `Merge` (a prefix
        may be a text).

        >>> str(Mask.parse("v2v+merge", kernel_size=5))
        'v2v+merge'

        Raises `ValueError` for an unknown policy, and for options beside a mask that is no light
        form.
        """
        if "+" in name.removesuffix(LIGHT):
            names = [*POLICIES, *(each + LIGHT for each in POLICIES)]
            near = nearest(name, names)
            raise ValueError(
                f"mask {name!r} is neither a policy nor POLICY{LIGHT}; the nearest is {near!r}"
            )
        policy = get_policy(name.removesuffix(LIGHT))
        if name.endswith(LIGHT):
            unknown = sorted(options.keys() - {field.name for field in fields(Merge)})
            if unknown:
                raise ValueError(f"{', '.join(unknown)}: no options of a light form")
            return cls(policy, Merge.parse(**options))
        if options:
            raise ValueError(
                f"{', '.join(options)}: options of a light form, but the mask is {name!r}, not "
                f"'{name}{LIGHT}'"
            )
        return cls(policy)

    @classmethod
    def of(cls, mask: "str | Policy | Mask", merge: Merge | None = None) -> "Mask":
        """The mask that is meant by a name, a policy or a mask; `merge` gives the options of a
        light form, which it makes of a bare policy too."""
        if isinstance(mask, str):
            mask = cls.parse(mask)
        elif isinstance(mask, Policy):
            mask = cls(mask)
        return mask if merge is None else replace(mask, merge=merge)

    def __str__(self) -> str:
        return self.policy.name + (LIGHT if self.merge else "")

    @property
    def looks_ahead(self) -> bool:
        """Whether the policy reveals anything, be it attended to or pooled."""
        return bool(self.policy.reveals)

    def record(self) -> dict:
        """What a checkpoint's `config.json` says under `fmtrain`: the whole table of the policy,
        not only its name."""
        return {
            "policy": self.policy.name,
            "reveals": sorted([query.name, key.name] for query, key in self.policy.reveals),
            "within_image": self.policy.within_image,
            "merge": None if self.merge is None else asdict(self.merge),
            "version": VERSION,
        }

    @classmethod
    def from_record(cls, record: dict) -> "Mask":
        """The mask that `record` describes; a policy by its table, whatever is known by its name.

        Raises `ValueError` for one that was written under other mask definitions than these.
        """
        if not isinstance(record, dict):
            raise ValueError(f"the record of the mask is malformed: {record!r:.80} is no mapping")
        if record.get("version") != VERSION:
            raise ValueError(
                f"the checkpoint's mask definitions have version {record.get('version')}, this "
                f"fmtrain has {VERSION}"
            )
        try:
            merge = None if record.get("merge") is None else Merge(**record["merge"])
            if "reveals" not in record:  # of a checkpoint from before tables were recorded
                return cls(get_policy(record["policy"]), merge)
            reveals = frozenset((Role[query], Role[key]) for query, key in record["reveals"])
            policy = Policy(record["policy"], reveals, record["within_image"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the record of the mask is malformed: {error!r} in {record}"
            ) from error
        known = POLICIES.get(policy.name)
        return cls(known if known is not None and known == policy else policy, merge)


def parse_masks(names: Iterable[str], **options) -> list[Mask]:
    """The masks of several names; `options` are those of their light forms. Raises `ValueError` as
    `Mask.parse`."""
    return [Mask.parse(name, **(options if name.endswith(LIGHT) else {})) for name in names]


@dataclass(frozen=True)
class Allowed:
    """What queries may attend to, True = may attend: the past, and what the policy reveals of the
    future (None: nothing)."""

    past_B1QK: torch.Tensor
    revealed_B1QK: torch.Tensor | None

    @classmethod
    def of(cls, policy: Policy, layout: Layout, start: int = 0) -> "Allowed":
        """For the queries from `start` on."""
        index = torch.arange(layout.shape[1], device=layout.role.device)
        q, k = policies.tokens(layout, index[start:], 1), policies.tokens(layout, index, 2)
        ahead = policies.revealed(policy, q, k)[:, None] if policy.reveals else None
        return cls(policies.past(q, k)[:, None], ahead)

    @property
    def both_B1QK(self) -> torch.Tensor:
        return self.past_B1QK if self.revealed_B1QK is None else self.past_B1QK | self.revealed_B1QK


def allowed(mask: "str | Policy | Mask", layout: Layout, start: int = 0) -> torch.Tensor:
    """Which key each query attends to: bool [B, T - start, T], True = attends.

        allowed(q, k) = same sample and (k <= q or (same prefill and (role[q], role[k]) in reveals))

    Of a light form the first half alone. Queries are the tokens from `start` on (the ones before
    are in the cache). A padded query attends to itself only.
    """
    mask = Mask.of(mask)
    pairs = Allowed.of(mask.policy, layout, start)
    return (pairs.past_B1QK if mask.merge else pairs.both_B1QK)[:, 0]


def beside(mask: "str | Mask", own: Mask | None) -> Mask:
    """The mask to compare with `own`: a light form by its name pools as `own` does, where that is
    one."""
    named = Mask.of(mask)
    if isinstance(mask, str) and own is not None and None not in (named.merge, own.merge):
        return Mask.of(named, own.merge)
    return named


def cut(mask: Mask, layout: Layout, start: int) -> bool:
    """Whether tokens before `start`, computed without those from there on, depend on any of them:
    see one ahead or, in a light form, pool over a prefill that goes on there."""
    if not (layout.prefill[:, start:] >= 0).any():  # tokens of answers alone, as in decoding
        return False
    policy = mask.policy
    if mask.merge is not None:  # windows and prefix are counted over the whole prefill
        looking, keys = {query for query, _ in policy.reveals}, (Role.TEXT, Role.VISUAL)
        policy = replace(policy, reveals=frozenset(product(looking, keys)), within_image=False)
    for row in torch.stack((layout.role, layout.image, layout.prefill, layout.sample), -1):
        before, behind = (tokens.unique(dim=0).T for tokens in (row[:start], row[start:]))
        q = policies.Tokens(*before[:, :, None], index=torch.tensor(0))
        k = policies.Tokens(*behind[:, None, :], index=torch.tensor(1))
        if policies.revealed(policy, q, k).any():
            return True
    return False


class State(IntEnum):
    """What a query and a key are to each other, for whoever draws a mask."""

    CLOSED = 0
    CAUSAL = 1
    REVEALED = 2  # by the policy, and attended to
    POOLED = 3  # revealed, but in a light form: not attended to


def states(
    mask: "str | Policy | Mask", layout: Layout, index: torch.Tensor | None = None
) -> torch.Tensor:
    """The `State` of each pair of tokens of the first row, or of those at `index` [N]: int [N, N].

    Padding is closed to everything.
    """
    mask, row = Mask.of(mask), layout[:1]
    index = torch.arange(layout.shape[1]) if index is None else index
    q, k = policies.tokens(row, index, 1), policies.tokens(row, index, 2)
    real = (q.sample >= 0) & (k.sample >= 0)
    ahead = int(State.POOLED if mask.merge else State.REVEALED)
    past = policies.past(q, k) & real
    return (past * int(State.CAUSAL) + policies.revealed(mask.policy, q, k) * ahead)[0]


def picture(mask: "str | Policy | Mask", layout: Layout) -> str:
    """The mask of the first row as text: `#` causal, `+` revealed, `o` pooled (a light form), `.`
    closed, `x` padding.

    >>> print(picture("v2v", Layout.parse("TIIT A")))
      TIITA
    T #....
    I ##+..
    I ###..
    T ####.
    A #####
    """
    names = "".join(str(layout[:1]).translate({ord("/"): None, ord("|"): None}))
    lines = ["  " + names]
    for q, row in enumerate(states(mask, layout).tolist()):
        marks = [".#+o"[state] for state in row]
        if names[q] == ".":
            marks[q] = "x"
        lines.append(f"{names[q]} {''.join(marks)}")
    return "\n".join(lines)


EXAMPLE = "TIIJJT AA / TKKT AA"
