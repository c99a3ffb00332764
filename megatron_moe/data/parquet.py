"""Parquet files: one column of texts, read a few rows at a time. pyarrow is imported where one is opened."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_moe.config.errors import InputError
from megatron_moe.data.cutting import Cuts
from megatron_moe.data.documents import Chunk, Unit
from megatron_moe.data.packed import READ_BYTES, damage_named, optional

_MOST_ROWS = 1 << 16


class ParquetFile:
    """The rows of a parquet file, each a document: the text in the column `column`."""

    def __init__(self, path: str, column: str, chunk_bytes: int) -> None:
        """Read the file's own description. InputError if it is damaged, no parquet file or without rows, and
        if its columns don't fit.

        Args:
            chunk_bytes: about so much text makes a chunk.
        """
        self.path = path
        self._column = column
        self._chunk_bytes = chunk_bytes
        self._parquet = optional("pyarrow.parquet", "parquet", path)
        self._arrow = optional("pyarrow", "parquet", path)
        with damage_named(path):
            self._size = os.path.getsize(path)
            self._source = open(path, "rb")  # noqa: SIM115 (closed by close)
        try:
            with damage_named(path), self._naming_damage("its description"):
                self._file = self._parquet.ParquetFile(
                    self._source, buffer_size=READ_BYTES, page_checksum_verification=True
                )
                self._check_column(self._file.schema_arrow)
            self._metadata = self._file.metadata
            if not self._metadata.num_rows:
                raise InputError(f"{path}: the file has no rows; give one that holds text")
        except BaseException:
            self._source.close()
            raise
        self._rows_read = 0

    @property
    def bytes_read(self) -> int:
        """In proportion to the rows: other columns are passed over."""
        return self._size * self._rows_read // int(self._metadata.num_rows)

    @property
    def sha256(self) -> str:
        from megatron_moe.data.inputs import file_sha256

        return file_sha256(self.path)

    def close(self) -> None:
        self._file.close()
        self._source.close()

    def chunks(self, unit: Unit, cuts: Cuts) -> Iterator[Chunk]:
        for group in range(self._metadata.num_row_groups):
            rows = self._metadata.row_group(group).num_rows
            if not rows:
                continue
            batches = self._file.iter_batches(
                self._rows_at_once(group), row_groups=[group], columns=self._columns(), use_threads=False
            )
            for _ in range(rows):
                with damage_named(self.path), self._naming_damage(f"row {self._rows_read + 1} or behind it"):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    chunk = self._chunk(batch)
                self._rows_read += batch.num_rows
                yield chunk

    def _columns(self) -> list[str]:
        return [self._column]

    def _check_column(self, schema: Any) -> None:
        names = list(schema.names)
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        if (count := names.count(self._column)) != 1:
            what = f"{count} columns" if count else "no column"
            raise InputError(f"{self.path}: json_key '{self._column}' is {what}; there are {shown or 'none'}")
        found = schema.field(self._column).type
        types = self._arrow.types
        text = found.value_type if types.is_dictionary(found) else found
        if not (types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)):
            texts = [
                field.name
                for field in schema
                if types.is_string(field.type) or types.is_large_string(field.type)
            ]
            raise InputError(
                f"{self.path}: the column '{self._column}' (json_key) holds {found}, not text; "
                f"columns of text: {', '.join(texts) or 'none'}"
            )

    def _rows_at_once(self, group: int) -> int:
        about = self._metadata.row_group(group)
        schema = self._metadata.schema
        columns = [
            i for i in range(len(schema)) if schema.column(i).path.partition(".")[0] in self._columns()
        ]
        bytes_a_row = sum(about.column(i).total_uncompressed_size for i in columns) / about.num_rows
        return max(1, min(_MOST_ROWS, int(self._chunk_bytes / max(1.0, bytes_a_row))))

    def _chunk(self, batch: Any) -> Chunk:
        """The texts of some rows, as one string of bytes and their lengths."""
        column = batch.column(self._column)
        missing = np.asarray(column.is_null())
        texts = column.cast(self._arrow.large_string()).fill_null("")
        _, offset_bytes, values = texts.buffers()
        offsets = np.frombuffer(offset_bytes, np.int64, len(texts) + 1, 8 * texts.offset)
        row_bytes = np.where(missing, -1, np.diff(offsets))
        payload = b"" if values is None else values[offsets[0] : offsets[-1]].to_pybytes()
        return Chunk(self.path, self._rows_read + 1, payload, "row", row_bytes=row_bytes)

    @contextlib.contextmanager
    def _naming_damage(self, where: str) -> Iterator[None]:
        """pyarrow has many ways to say that a file is damaged."""
        try:
            yield
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
                raise
            message = " ".join(str(error).split())
            raise InputError(
                f"{self.path}: not a parquet file, or a damaged one ({where}): {message[:200]}"
            ) from None
