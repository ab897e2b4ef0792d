//! A slice is the same part of the whole, whatever container it comes from, and nothing else is read for it.

use std::ops::Range;
use std::path::Path;

use candle_core::DType;
use half::bf16;
use incipit_kernels::{Frozen, FrozenSlice};
use incipit_weights::{Checkpoint, Random, RandomTensor, Source};

use crate::support::{fixture, numbers, ones, says, single, tensor};

fn at(
    source: &dyn Source,
    name: &str,
    shape: &[usize],
    (rows, cols): (Range<usize>, Range<usize>),
) -> Frozen {
    source.part(name, shape, rows, cols).unwrap()
}

/// Rows and columns to be cut out of a matrix: all, some, one, none, of either.
fn some_of((height, width): (usize, usize)) -> Vec<(Range<usize>, Range<usize>)> {
    let of = |n: usize| [0..n, 0..n / 2, n / 2..n, n - 1..n, n / 3..n / 3];
    of(height).into_iter().flat_map(|rows| of(width).map(|cols| (rows.clone(), cols))).collect()
}

/// Holds every slice of every tensor against the whole.
fn check_slices_of(source: &dyn Source) {
    for info in source.tensors() {
        let whole = source.frozen(&info.name, &info.shape).unwrap();
        let (height, width) = (whole.rows(), whole.cols());
        for (rows, cols) in some_of((height, width)) {
            let part = at(source, &info.name, &info.shape, (rows.clone(), cols.clone()));
            let expected = whole.part((rows.start, rows.len()), (cols.start, cols.len()));
            assert_eq!((part.rows(), part.cols(), part.dtype()), (rows.len(), cols.len(), whole.dtype()));
            assert_eq!(part.to_f32(), expected.to_f32(), "{} {rows:?} {cols:?}", info.name);
        }
    }
}

#[test]
fn a_slice_of_a_file_is_that_part_of_the_whole() {
    let tensors = [
        ("a", tensor(&numbers(15 * 22), &[15, 22], DType::F32)),
        ("b", tensor(&numbers(600 * 1001), &[600, 1001], DType::F32)),
        ("c", tensor(&numbers(9 * 12), &[9, 12], DType::BF16)),
        ("d", tensor(&numbers(31), &[31], DType::BF16)),
        ("e", tensor(&numbers(60), &[3, 4, 5], DType::F32)),
    ];
    let dir = single(&tensors);
    for dtype in [DType::F32, DType::BF16] {
        check_slices_of(&Checkpoint::open(dir.path(), dtype).unwrap());
    }
}

#[test]
fn a_slice_of_a_pytorch_file_is_that_part_of_the_whole() {
    for (name, dtype) in
        [("bin", DType::F32), ("bin", DType::BF16), ("bin_sharded", DType::F32), ("safetensors", DType::BF16)]
    {
        check_slices_of(&Checkpoint::open(&fixture(name), dtype).unwrap());
    }
}

#[test]
fn a_slice_of_numbers_that_are_not_aligned_is_that_part_of_the_whole() {
    let values: Vec<f32> = numbers(40);
    let dir = single(&[("w", tensor(&values, &[5, 8], DType::F32))]);
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut shifted = (header as u64 + 1).to_le_bytes().to_vec();
    shifted.extend(&bytes[8..8 + header]);
    shifted.push(b' ');
    shifted.extend(&bytes[8 + header..]);
    std::fs::write(&path, shifted).unwrap();
    let checkpoint = Checkpoint::open(dir.path(), DType::F32).unwrap();
    assert_eq!(checkpoint.frozen("w", &[5, 8]).unwrap().to_f32(), values);
    check_slices_of(&checkpoint);
}

#[test]
fn a_slice_of_random_weights_is_that_part_of_the_whole() {
    let tensor = |name: &str, shape: &[usize]| RandomTensor {
        name: name.to_owned(),
        shape: shape.to_vec(),
        mean: 0.25,
        deviation: 1.0,
    };
    let tensors = vec![tensor("a", &[701, 803]), tensor("b", &[7]), tensor("c", &[3, 2, 5])];
    for dtype in [DType::F32, DType::BF16] {
        let seed = 11;
        println!("seed {seed}");
        check_slices_of(&Random::new(tensors.clone(), dtype, seed).unwrap());
    }
}

#[test]
fn a_source_that_does_not_say_how_is_cut_all_the_same() {
    struct Plain(Random);
    impl Source for Plain {
        fn tensors(&self) -> Vec<incipit_weights::TensorInfo> {
            self.0.tensors()
        }
        fn contains(&self, name: &str) -> bool {
            self.0.contains(name)
        }
        fn frozen(&self, name: &str, shape: &[usize]) -> incipit_weights::Result<Frozen> {
            self.0.frozen(name, shape)
        }
    }
    let tensor = RandomTensor { name: "a".to_owned(), shape: vec![12, 18], mean: 0.0, deviation: 1.0 };
    check_slices_of(&Plain(Random::new(vec![tensor], DType::F32, 1).unwrap()));
}

#[test]
fn the_slices_of_all_ranks_are_the_whole() {
    let (height, width) = (24, 40);
    let values: Vec<f32> = numbers(height * width).into_iter().map(|x| bf16::from_f32(x).to_f32()).collect();
    let dir = single(&[("w", tensor(&values, &[height, width], DType::BF16))]);
    let checkpoint = Checkpoint::open(dir.path(), DType::BF16).unwrap();
    for ranks in [1, 2, 4, 8] {
        let (mut by_rows, mut by_cols) = (Vec::new(), vec![Vec::new(); height]);
        for rank in 0..ranks {
            let share = |size: usize| rank * size / ranks..(rank + 1) * size / ranks;
            let part = at(&checkpoint, "w", &[height, width], (share(height), 0..width));
            by_rows.extend(part.to_f32());
            let part = at(&checkpoint, "w", &[height, width], (0..height, share(width)));
            for (row, values) in by_cols.iter_mut().zip(part.to_f32().chunks(width / ranks)) {
                row.extend_from_slice(values);
            }
        }
        assert_eq!(by_rows, values, "rows of {ranks} ranks");
        assert_eq!(by_cols.concat(), values, "columns of {ranks} ranks");
    }
}

#[test]
fn stored_numbers_of_a_slice_are_read_in_place() {
    let dir = single(&[("w", tensor(&numbers(64), &[8, 8], DType::BF16))]);
    let checkpoint = Checkpoint::open(dir.path(), DType::BF16).unwrap();
    let address = |frozen: &Frozen| match frozen.values() {
        FrozenSlice::Bf16(values) => values.as_ptr() as usize,
        FrozenSlice::F32(values) => values.as_ptr() as usize,
    };
    let whole = checkpoint.frozen("w", &[8, 8]).unwrap();
    let part = at(&checkpoint, "w", &[8, 8], (2..6, 3..5));
    assert_eq!((address(&part) - address(&whole), part.stride()), (2 * (2 * 8 + 3), 8));
}

#[test]
fn what_is_wrong_is_said_as_of_a_whole_tensor() {
    let dir = single(&[("shared.weight", ones(&[7, 4], DType::F32)), ("h", ones(&[4, 4], DType::F16))]);
    let checkpoint = Checkpoint::open(dir.path(), DType::BF16).unwrap();
    let refusal = |source: &dyn Source, name: &str, shape: &[usize]| {
        let text = source.part(name, shape, 0..2, 0..2).unwrap_err().to_string();
        assert_eq!(text, source.frozen(name, shape).unwrap_err().to_string());
        text
    };
    says(&refusal(&checkpoint, "shared.weights", &[7, 4]), &["similar names there: shared.weight"]);
    says(&refusal(&checkpoint, "shared.weight", &[4, 7]), &["[7, 4]", "[4, 7]"]);
    says(&refusal(&checkpoint, "h", &[4, 4]), &["f16", "incipit convert model"]);
    let random = Random::new(Vec::new(), DType::F32, 0).unwrap();
    says(&refusal(&random, "w", &[7, 4]), &["no tensor w"]);
}

#[test]
#[should_panic(expected = "columns 0..5 of a matrix of 7 x 4")]
fn a_slice_beyond_the_tensor_is_a_mistake_of_the_caller() {
    let dir = single(&[("w", ones(&[7, 4], DType::F32))]);
    let _ = Checkpoint::open(dir.path(), DType::BF16).unwrap().part("w", &[7, 4], 0..7, 0..5);
}

/// Bytes before the numbers of a safetensors file.
fn table(dir: &Path) -> u64 {
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    8 + u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

#[test]
fn bytes_are_counted_when_they_are_asked_for_and_once() {
    let dir = single(&[
        ("v", ones(&[6], DType::BF16)),
        ("w", tensor(&numbers(48), &[8, 6], DType::F32)),
        ("x", tensor(&numbers(48), &[8, 6], DType::F32)),
    ]);
    // Conversion does not change what is read.
    for dtype in [DType::F32, DType::BF16] {
        let checkpoint = Checkpoint::open(dir.path(), dtype).unwrap();
        let mut expected = table(dir.path());
        assert_eq!(checkpoint.bytes_read(), expected);
        let mut ask = |name, shape: &[usize], rows, cols, more: u64| {
            checkpoint.part(name, shape, rows, cols).unwrap();
            expected += 4 * more;
            assert_eq!(checkpoint.bytes_read(), expected, "{name}");
        };
        ask("w", &[8, 6], 2..4, 0..6, 12);
        ask("w", &[8, 6], 3..6, 0..6, 12);
        ask("w", &[8, 6], 2..6, 0..6, 0);
        ask("w", &[8, 6], 0..8, 0..3, 4 * 3);
        ask("x", &[8, 6], 0..8, 4..6, 16);
        ask("x", &[8, 6], 3..3, 4..6, 0);
        ask("w", &[8, 6], 0..8, 0..6, 48 - 36);
        ask("v", &[6], 0..1, 0..6, 3);
        assert!(checkpoint.part("x", &[6, 8], 0..6, 0..8).is_err());
        assert_eq!(checkpoint.bytes_read(), expected);
    }
}

#[test]
fn hashing_counts_what_was_not_read_yet() {
    let dir = single(&[("a", tensor(&numbers(64), &[8, 8], DType::F32)), ("b", ones(&[6], DType::F32))]);
    let checkpoint = Checkpoint::open(dir.path(), DType::F32).unwrap();
    let dim = |name: &str| (name == "a").then_some(1);
    let second_half = |parts: usize| parts / 2..parts;
    checkpoint.part("a", &[8, 8], 0..8, 4..8).unwrap();
    checkpoint.fingerprint_parts(&dim, &second_half);
    assert_eq!(checkpoint.bytes_read(), table(dir.path()) + 4 * (32 + 6), "half of a, and b");
    checkpoint.fingerprint(&dim).unwrap();
    assert_eq!(
        checkpoint.bytes_read(),
        std::fs::metadata(dir.path().join("model.safetensors")).unwrap().len()
    );
}

#[test]
fn opening_a_pytorch_file_reads_its_table_of_contents() {
    let checkpoint = Checkpoint::open(&fixture("bin"), DType::F32).unwrap();
    let file = std::fs::metadata(fixture("bin").join("pytorch_model.bin")).unwrap().len();
    let read = checkpoint.bytes_read();
    println!("{read} of {file} bytes");
    assert!(read > 0 && read < file - 4 * 28);
    checkpoint.part("lm_head.weight", &[7, 4], 0..7, 0..2).unwrap();
    assert_eq!(checkpoint.bytes_read(), read + 2 * 14);
}
