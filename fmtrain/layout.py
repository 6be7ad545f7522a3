"""What each token of a batch is: its role, its image, its prefill and its sample.

Everything that differs between training and inference is derived from this one object: the
attention mask, the labels, the windows of `merge`. Shape names: B rows, T tokens.
"""

from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch

PREFIX = "layout_"  # of the keyword tensors that carry a layout to an attached model


class Role(IntEnum):
    PAD = 0
    TEXT = 1  # system, user, and the header of the assistant's turn
    VISUAL = 2  # one image feature
    ANSWER = 3  # produced token by token


@dataclass(frozen=True)
class Layout:
    """Four integer tensors [B, T].

    role: a `Role`. image: index of the image within its sample, -1 unless VISUAL. prefill: index,
    within its sample, of the prefill in which the token is fed, -1 for answers and padding. sample:
    index of the training sample within the row, -1 for padding.
    """

    role: torch.Tensor
    image: torch.Tensor
    prefill: torch.Tensor
    sample: torch.Tensor

    @classmethod
    def parse(cls, picture: str) -> "Layout":
        """A layout [1, T] from a picture, one character a token.

        `T` text, `I J K L` tokens of four images (a letter means one image within one turn), `A`
        answer, `.` padding, `/` next turn, `|` next packed sample; blanks mean nothing.

        >>> Layout.parse("TIIT A / TJT AA").prefill.tolist()
        [[0, 0, 0, 0, -1, 1, 1, 1, -1, -1]]

        Raises `ValueError` for any other character, and for a prefill token behind an answer of the
        same turn.
        """
        columns: list[tuple[int, int, int, int]] = []
        sample, turn, answered, images = 0, 0, False, {}
        for character in "".join(picture.split()):
            if character == "|":
                sample, turn, answered, images = sample + 1, 0, False, {}
            elif character == "/":
                turn, answered = turn + 1, False
            elif character == ".":
                columns.append((Role.PAD, -1, -1, -1))
            elif character == "A":
                answered = True
                columns.append((Role.ANSWER, -1, -1, sample))
            elif character in "TIJKL":
                if answered:
                    raise ValueError(
                        f"{character!r} stands behind an answer in turn {turn} of {picture!r}: "
                        f"write / first"
                    )
                image = (
                    -1 if character == "T" else images.setdefault((turn, character), len(images))
                )
                columns.append(
                    (Role.TEXT if character == "T" else Role.VISUAL, image, turn, sample)
                )
            else:
                raise ValueError(
                    f"{character!r} in the picture {picture!r}; known are T I J K L A . / | and "
                    f"blanks"
                )
        if not columns:
            raise ValueError(f"the picture {picture!r} holds no token")
        return cls(*torch.tensor(columns).T[:, None].contiguous())

    @classmethod
    def from_model_inputs(cls, inputs: dict) -> "Layout | None":
        """Take a layout out of a model's keyword arguments, which lose it; None for none."""
        names = [PREFIX + field.name for field in fields(cls)]
        missing = [name for name in names if inputs.get(name) is None]
        tensors = [inputs.pop(name, None) for name in names]
        if len(missing) == len(names):
            return None
        if missing:
            raise ValueError(f"a layout needs all of its tensors; missing: {', '.join(missing)}")
        return cls(*tensors)

    def tensors(self) -> list[torch.Tensor]:
        """role, image, prefill and sample."""
        return [self.role, self.image, self.prefill, self.sample]

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """The keyword tensors [B, T] that carry this layout to an attached model's `forward` and
        `generate`."""
        return {PREFIX + field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def shape(self) -> tuple[int, int]:
        rows, tokens = self.role.shape
        return rows, tokens

    @property
    def packed(self) -> bool:
        """Whether any row holds more than one sample."""
        return bool((self.sample > 0).any())

    @property
    def padded(self) -> bool:
        return not bool(self.real.all())

    # Roles are compared as integers: dynamo folds `tensor == IntEnum` to False where the tensor is
    # no input of its graph, and every mask would be causal under torch.compile.

    @property
    def real(self) -> torch.Tensor:
        """Which tokens are none of the padding, bool [B, T]."""
        return self.role != int(Role.PAD)

    @property
    def visual(self) -> torch.Tensor:
        """Which tokens are image features, bool [B, T]."""
        return self.role == int(Role.VISUAL)

    @property
    def answer(self) -> torch.Tensor:
        """Which tokens are produced one by one, bool [B, T]."""
        return self.role == int(Role.ANSWER)

    def map(self, change) -> "Layout":
        """The layout with `change` applied to each of its tensors."""
        return Layout(*(change(tensor) for tensor in self.tensors()))

    def to(self, device) -> "Layout":
        return self.map(lambda tensor: tensor.to(device))

    def __getitem__(self, index) -> "Layout":
        return self.map(lambda tensor: tensor[index])

    def pad(self, left: int = 0, right: int = 0) -> "Layout":
        """The layout with padding on either side, in tokens."""
        pad = torch.nn.functional.pad
        padded = self.map(lambda tensor: pad(tensor, (left, right), value=-1))
        return replace(padded, role=pad(self.role, (left, right), value=int(Role.PAD)))

    @staticmethod
    def cat(layouts: "list[Layout]", dim: int = 0) -> "Layout":
        columns = zip(*(each.tensors() for each in layouts))
        return Layout(*(torch.cat(column, dim) for column in columns))

    def positions(self) -> torch.Tensor:
        """Position of each token in its sample, counted from 0 [B, T]; 0 for padding, which counts
        nowhere."""
        real = self.real
        index = real.long().cumsum(1) - 1
        columns = torch.arange(real.shape[1], device=real.device)
        latest = torch.where(real, columns, 0).cummax(1).values  # real token up to here
        sample = self.sample.gather(1, latest)
        start = torch.ones_like(real)
        start[:, 1:] = sample[:, 1:] != sample[:, :-1]
        first = torch.where(start & real, index, 0).cummax(1).values
        return torch.where(real, index - first, 0)

    def __str__(self) -> str:
        """The picture of each row, a line a row."""
        columns = [tensor.tolist() for tensor in self.tensors()]
        return "\n".join(_picture(row) for row in zip(*columns))


def _picture(row: tuple[list[int], ...]) -> str:
    characters, last, letters = [], None, {}
    for role, image, prefill, sample in zip(*row):
        if role == Role.PAD:
            characters.append(".")
            continue
        if last is not None and sample != last[0]:
            characters.append("|")
        elif last is not None and prefill != -1 and prefill != last[1]:
            characters.append("/")
        if role == Role.VISUAL:
            known = letters.setdefault((sample, prefill), {})
            characters.append("IJKL"[known.setdefault(image, len(known)) % 4])
        else:
            characters.append("A" if role == Role.ANSWER else "T")
        last = (sample, last[1] if prefill == -1 and last and last[0] == sample else prefill)
    return "".join(characters)
