"""The columns of a row and their types, for whoever writes rows and whoever reads them."""

import json
from typing import Any

import pyarrow as pa

COLUMNS = ("id", "source", "messages", "images")
EVALUATION_ONLY = "evaluation_only/"  # how `source` begins in rows that must not be trained on


def features(embed_images: bool = False) -> dict[str, Any]:
    """The types of the columns, in the form of `datasets.Features.from_dict`.

    Embedded images are `Image(decode=False)`, so that they are opened by
    `fmtrain.data.images.open_image`, under its limits.
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


def arrow_schema(embed_images: bool = False) -> pa.Schema:
    """`features` in Arrow's types, and as they are under the metadata key that `datasets` reads."""
    columns = features(embed_images)
    fields = [(name, _arrow_type(column)) for name, column in columns.items()]
    info = json.dumps({"info": {"features": columns}}, separators=(",", ":"))
    return pa.schema(fields, metadata={"huggingface": info})


def _arrow_type(feature: dict[str, Any]) -> pa.DataType:
    kind = feature.get("_type")
    if kind == "Value":
        return pa.string()
    if kind == "List":
        return pa.list_(_arrow_type(feature["feature"]))
    if kind == "Image":
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.struct([(name, _arrow_type(inner)) for name, inner in feature.items()])
