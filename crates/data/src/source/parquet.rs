//! The rows of a Parquet table.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use parquet::file::reader::SerializedFileReader;
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Number, Value};

use super::{Record, Source};
use crate::error::{Error, Result};

pub(super) struct ParquetRows {
    path: PathBuf,
    rows: RowIter<'static>,
    row: usize,
}

impl ParquetRows {
    pub(super) fn new(path: &Path, file: File) -> Result<Self> {
        let rows = guarded(|| Ok(RowIter::from_file_into(Box::new(SerializedFileReader::new(file)?))));
        match rows {
            Ok(rows) => Ok(Self { path: path.to_path_buf(), rows, row: 0 }),
            Err(cause) => Err(Error::Parquet { path: path.to_path_buf(), row: 1, cause }),
        }
    }
}

impl Source for ParquetRows {
    fn next_record(&mut self) -> Result<Option<(usize, Record)>> {
        self.row += 1;
        // Even to write out a date can panic, so that the conversion is guarded with the reading.
        match guarded(|| Ok(self.rows.next().transpose()?.map(record))) {
            Ok(record) => Ok(record.map(|record| (self.row, record))),
            Err(cause) => Err(Error::Parquet { path: self.path.clone(), row: self.row, cause }),
        }
    }
}

/// Runs the reader, which panics at some damaged files and at some types of column instead of returning an
/// error.
fn guarded<T>(read: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the file is damaged, or has a type of column that is not supported".to_owned()),
    }
}

fn record(row: Row) -> Record {
    row.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect()
}

fn value(field: Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::Bool(value),
        Field::Byte(value) => Value::from(value),
        Field::Short(value) => Value::from(value),
        Field::Int(value) => Value::from(value),
        Field::Long(value) => Value::from(value),
        Field::UByte(value) => Value::from(value),
        Field::UShort(value) => Value::from(value),
        Field::UInt(value) => Value::from(value),
        Field::ULong(value) => Value::from(value),
        // By way of the shortest text: 0.1f32 is 0.1 and not 0.10000000149011612.
        Field::Float16(value) => value.to_string().parse().map_or(Value::Null, double),
        Field::Float(value) => value.to_string().parse().map_or(Value::Null, double),
        Field::Double(value) => double(value),
        Field::Str(text) => Value::String(text),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Value::String(text.to_owned()),
            Err(_) => Value::Array(bytes.data().iter().map(|&byte| Value::from(byte)).collect()),
        },
        Field::Group(row) => Value::Object(record(row)),
        Field::ListInternal(list) => Value::Array(list.elements().iter().cloned().map(value).collect()),
        Field::MapInternal(map) => Value::Array(
            map.entries()
                .iter()
                .map(|(k, v)| Value::Array(vec![value(k.clone()), value(v.clone())]))
                .collect(),
        ),
        // Dates, times and decimals, in the library's notation.
        other @ (Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_)) => Value::String(other.to_string()),
    }
}

/// A number, or null for what JSON has no number for.
fn double(value: f64) -> Value {
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}
