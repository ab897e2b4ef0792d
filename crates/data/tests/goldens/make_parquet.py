#!/usr/bin/env python3
"""Writes the Parquet files beside this file, in the forms that data sets come in: dictionary-encoded and plain strings,
nulls, large strings, every compression that the crate reads, two row groups, data page version 2, nested columns,
dates and raw bytes; and documents of a corpus.

Made with pyarrow 26.0.1.    pip install pyarrow==26.0.1 && python make_parquet.py
"""
import datetime
import decimal
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

assert pa.__version__ == "26.0.1", pa.__version__
here = pathlib.Path(__file__).parent

for compression in ["none", "snappy", "gzip", "zstd", "lz4"]:
    table = pa.table({
        "inputs": pa.array(["plain", "Émile 東京", "third, \"row\"\n"]),
        "targets": pa.array(["yes", "no", "yes"]).dictionary_encode(),
    })
    version = "2.0" if compression == "zstd" else "1.0"
    pq.write_table(
        table, here / f"rows_{compression}.parquet", compression=compression, row_group_size=2,
        data_page_version=version, store_schema=False,
    )

types = pa.table({
    "text": pa.array(["a"], pa.large_string()),
    "int": pa.array([-3], pa.int8()),
    "big": pa.array([2**64 - 1], pa.uint64()),
    "single": pa.array([0.1], pa.float32()),
    "half": pa.array([0.5], pa.float16()),
    "double": pa.array([0.25], pa.float64()),
    "nan": pa.array([float("nan")], pa.float64()),
    "flag": pa.array([True]),
    "none": pa.array([None], pa.string()),
    "bytes_text": pa.array([b"bytes"], pa.binary()),
    "bytes": pa.array([b"\xff\x00"], pa.binary()),
    "date": pa.array([datetime.date(2021, 4, 18)]),
    "price": pa.array([decimal.Decimal("12.50")], pa.decimal128(6, 2)),
    "list": pa.array([["x", "y"]]),
    "struct": pa.array([{"k": 1}]),
})
pq.write_table(types, here / "types.parquet", store_schema=False)
pq.write_table(types.slice(0, 0).select(["text"]), here / "no_rows.parquet", store_schema=False)

documents = pa.table({
    "url": pa.array(["/1", "/2", "/3", "/4", "/5"]),
    "text": pa.array(["a b c", "", "d e f g h i j", "k", "l m"]),
})
pq.write_table(documents, here / "documents.parquet", row_group_size=2, store_schema=False)
