"""LLaVA-v1.5-mix665k (liuhaotian/LLaVA-Instruct-150K: llava_v1_5_mix665k.json), the instruction mix
of LLaVA-1.5.

The form of LLaVA-Instruct, but images are named with their folder, one of five (coco/train2017,
gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K and VG_100K_2), and about 40,000
dialogues (ShareGPT) have no image. The image root is the folder that holds the five. A row's source
names its folder, or `text`. Boxes in its texts (Visual Genome, RefCOCO) are kept as they are.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.converting.command import Converter, Options, SourceRecord, run, source_file
from data_prep.converting.conversations import image_names, messages_of, without_opening
from data_prep.converting.fields import field, text_of
from data_prep.converting.rows import Row
from data_prep.llava_instruct import records

FOLDERS = ("coco", "gqa", "ocr_vqa", "textvqa", "vg")


def files(source: Path, options: Options) -> list[Path]:
    """The annotation file."""
    return [source_file(source, "llava_v1_5_mix665k.json")]


def rows(record: SourceRecord, options: Options) -> Iterator[Row | str]:
    """One row a dialogue. Raises `ValueError` for an image outside the five folders."""
    value = record.value
    turns = field(value, "conversations", list)
    images = image_names(value, "image")
    folders = {name.split("/", 1)[0] for name in images}
    if not folders <= set(FOLDERS):
        raise ValueError(f"image {images[0]!r:.200} is in none of the folders {', '.join(FOLDERS)}")
    kind = "+".join(sorted(folders)) or "text"
    row_id = f"{text_of(value.get('id', ''), 'id')}#{record.number}"
    messages, left_out = without_opening(messages_of(turns, bool(images)))
    yield {"id": row_id, "source": f"llava_mix665k/{kind}", "messages": messages, "images": images}
    yield from left_out


CONVERTER = Converter("llava_mix665k", __doc__, files, records, rows, box_frame="square")

if __name__ == "__main__":
    run(CONVERTER)
