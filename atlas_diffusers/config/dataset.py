"""Where the pictures of a recipe come from."""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

EMBEDDED = ("embedded:emoji", "embedded:pictograms", "embedded:digits")


Captions = Literal["auto", "metadata", "files", "names", "folders"]


class StrictModel(BaseModel):
    """Rejects unknown keys."""

    model_config = ConfigDict(extra="forbid")

    def refuse(self, names: Iterable[str], reason: str) -> None:
        """Raise ``ValueError`` for those of some fields that differ from their defaults, though nothing reads them."""
        defaults = {name: type(self).model_fields[name].get_default(call_default_factory=True) for name in names}
        given = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        if given:
            raise ValueError(f"{', '.join(f'{name}={value!r:.60}' for name, value in given.items())}: not read {reason}")


class DatasetConfig(StrictModel):
    """Where pictures, captions and labels come from."""

    name: str = Field(
        default="embedded:emoji",
        description="`embedded:emoji`, `embedded:pictograms` or `embedded:digits`, a folder of pictures, `imagefolder` (of "
        "`datasets`), `disk` (`save_to_disk`), a parquet file or a hub id; a root beside any other name is the folder",
    )
    root: str | None = Field(default=None, description="folder of pictures, of an `imagefolder` or of a `disk` dataset")
    captions: Captions = Field(
        default="auto",
        description="of a folder: `metadata.jsonl` or `.csv`, `.txt` files beside the pictures, names of files or of "
        "subfolders; auto takes the first two, in this order",
    )
    split: str = "train"
    download: bool = Field(default=True, description="whether a hub id may be fetched; false takes the local cache only")
    streaming: bool = Field(default=False, description="read in the order of the source, without a copy on disk")
    shuffle_buffer: int = Field(default=1024, ge=1, description="pictures that a stream reads and shuffles at a time")
    categories: list[str] | None = Field(
        default=None, description="keep only these categories (embedded data; of digits `zero` to `nine`)"
    )
    styles: list[str] | None = Field(default=None, description="keep only these styles (embedded pictograms)")
    caption: str | None = Field(default=None, description="one caption for every picture, instead of theirs")
    image_column: str = "image"
    caption_column: str | None = Field(default="text", description="null trains without prompts")
    aliases_column: str | None = Field(default=None, description="a list of further captions, one drawn at random each time")
    alias_probability: float = Field(default=0.3, ge=0, le=1, description="how often an alias replaces the caption")
    label_column: str | None = Field(default=None, description="integer labels for a network with `num_class_embeds`")
    resolution: int = Field(default=32, ge=1)
    channels: Literal[1, 3] = Field(default=3, description="1 trains on grey pictures")
    center_crop: bool = True
    aspect_buckets: bool = Field(
        default=False,
        description="pictures keep their shape: sizes of about resolution² pixels up to 2:1, each batch of one size",
    )
    background: str = Field(default="white", description="colour under transparent pictures, by name or as #rrggbb")
    random_flip: bool = False
    skip_bad_images: bool = Field(
        default=False, description="replace a picture that cannot be read by the next one, and count it"
    )
    num_workers: int = Field(default=0, ge=0)
    batch_size: int | None = Field(
        default=None, ge=1, description="pictures an optimiser step, where the recipe has no batch_size"
    )

    @model_validator(mode="after")
    def _has_root(self):
        if self.root is not None and "name" not in self.model_fields_set:
            self.name = "folder"
        embedded, folder = self.name.startswith("embedded:"), self.name in ("imagefolder", "disk")
        if (folder and self.root is None) or (embedded and self.root is not None):
            raise ValueError(
                f"name={self.name!r} with root={self.root!r}: imagefolder and disk need a root, embedded data take none"
            )
        if self.aspect_buckets and (self.streaming or not self.center_crop):
            raise ValueError("aspect_buckets needs pictures of known sizes, cropped at their centre: no streaming, center_crop")
        if not self.streaming:
            self.refuse(["shuffle_buffer"], "without streaming")
        if self.aliases_column is None:
            self.refuse(["alias_probability"], "without aliases_column")
        if self.caption_column is None:
            self.refuse(["aliases_column", "captions"], "without caption_column")
        for field, names in (("categories", EMBEDDED), ("styles", EMBEDDED[1:2])):
            if getattr(self, field) is not None and self.name not in names:
                raise ValueError(f"{field} choose among the pictures of {' or '.join(names)}; name={self.name!r} has none")
        return self
