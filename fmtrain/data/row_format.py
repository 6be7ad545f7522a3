"""The columns of a row and their types, for whoever writes rows and whoever reads them. Imports nothing heavy."""

from typing import Any

COLUMNS = ("id", "source", "messages", "images")
EVALUATION_ONLY = (
    "evaluation_only/"  # first characters of `source` in rows that must not be trained on
)


def features(embed_images: bool = False) -> dict[str, Any]:
    """The types of the columns, in the form of `datasets.Features.from_dict`.

    Embedded images are `Image(decode=False)`, so that they are opened by `fmtrain.data.images.open_image`, under its limits.
    """
    text = {"dtype": "string", "_type": "Value"}
    image = {"decode": False, "_type": "Image"} if embed_images else text
    content = {"feature": {"type": text, "text": text}, "_type": "List"}
    messages = {"feature": {"role": text, "content": content}, "_type": "List"}
    return {
        "id": text,
        "source": text,
        "messages": messages,
        "images": {"feature": image, "_type": "List"},
    }
