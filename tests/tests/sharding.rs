//! The sharding table over real files: it knows every tensor, the ranks' slices are the whole, and a rank reads no more than
//! its own.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use incipit_collective::{Axis, Mesh, Shard};
use incipit_model::sharding::{Rule, sharded_dim, slice};
use incipit_model::{Config, T5, TensorAxis};
use incipit_tune::ranks::on_threads;
use incipit_weights::{Checkpoint, Digests, Random, Source, write_safetensors};

/// Of the numbers.
const SEED: u64 = 77;

fn goldens() -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens"))?;
    let all = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let models: Vec<PathBuf> = all.into_iter().filter(|dir| dir.join("model.safetensors").exists()).collect();
    ensure!(models.len() >= 6, "{models:?}");
    Ok(models)
}

/// A T5 1.1 of which 8 ranks can each have a part, in several files.
fn checkpoint(dir: &Path, dtype: DType) -> Result<Config> {
    println!("seed {SEED}");
    let small = Config::preset("small").context("a known shape")?;
    let config = Config {
        vocab_size: 1024,
        d_model: 128,
        d_kv: 16,
        d_ff: 256,
        num_heads: 8,
        num_layers: 2,
        num_decoder_layers: 3,
        ..small
    };
    let weights = Random::new(config.random_tensors(), dtype, SEED)?
        .with_side_files(vec![("config.json".to_owned(), b"{}".to_vec())]);
    write_safetensors(dir, &weights, dtype, 1 << 20)?;
    Ok(config)
}

#[test]
fn every_tensor_of_every_golden_checkpoint_has_a_rule() -> Result<()> {
    for dir in goldens()? {
        for tensor in Checkpoint::open(&dir, DType::F32)?.tensors() {
            ensure!(Rule::of(&tensor.name).is_some(), "{}: no rule for {}", dir.display(), tensor.name);
        }
    }
    Ok(())
}

#[test]
fn the_slices_of_all_ranks_are_the_whole() -> Result<()> {
    for dtype in [DType::BF16, DType::F32] {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model");
        let config = checkpoint(&path, dtype)?;
        // f32 files are also read as bf16, slice by slice.
        let checkpoint = Checkpoint::open(&path, DType::BF16)?;
        for (name, shape) in config.tensors() {
            let whole = checkpoint.frozen(&name, &shape)?;
            let (expected, cols) = (whole.to_f32(), whole.cols());
            for count in [1, 2, 4, 8] {
                let mut found = vec![f32::NAN; expected.len()];
                for index in 0..count {
                    let (rows, columns) = slice(&name, &shape, Shard::new(index, count)?)?;
                    let part = checkpoint.part(&name, &shape, rows.clone(), columns.clone())?.to_f32();
                    for (row, values) in rows.zip(part.chunks(columns.len())) {
                        found[row * cols..][columns.clone()].copy_from_slice(values);
                    }
                }
                ensure!(found == expected, "{name}, tp {count}: the slices are not the whole");
            }
        }
    }
    Ok(())
}

#[test]
fn a_rank_of_four_reads_less_than_a_third_of_the_files() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model");
    let config = checkpoint(&path, DType::BF16)?;
    let whole = Checkpoint::open(&path, DType::BF16)?;
    let size: u64 = whole.files().iter().map(|file| file.metadata().map_or(0, |m| m.len())).sum();
    let read = on_threads(Mesh::new(4, 1, 4)?, None, &Default::default(), |ranks| -> Result<_> {
        let own = Checkpoint::open(&path, DType::BF16)?;
        T5::load_on(config.clone(), &own, DType::BF16, &TensorAxis::of(&ranks), &Device::Cpu)?;
        let shard = ranks.shard(Axis::Tensor);
        let digests = own.fingerprint_parts(&sharded_dim, &|parts| shard.portion(parts));
        Ok((own.bytes_read(), digests.to_bytes()))
    });
    let mut all = Digests::default();
    for (rank, read) in read.into_iter().enumerate() {
        let (bytes, digests) = read?;
        println!("rank {rank} of 4 read {bytes} bytes of {size}, to load the model and to know it again");
        ensure!(bytes as f64 <= 0.30 * size as f64);
        all.merge(Digests::from_bytes(&digests)?);
    }
    ensure!(whole.fingerprint_of(&all)? == whole.fingerprint(&sharded_dim)?, "another fingerprint");
    Ok(())
}

/// T5-XXL's table of contents is enough to count its numbers, and the slices of its ranks.
#[test]
fn a_rank_of_xxl_has_its_share_of_11135332352_numbers() -> Result<()> {
    let config = Config::preset("xxl").context("a known shape")?;
    ensure!(config.num_parameters() == 11_135_332_352);
    let tensors = config.tensors();
    for count in [1, 2, 4, 8] {
        let mut most = 0;
        for index in 0..count {
            let held = tensors.iter().map(|(name, shape)| {
                let (rows, columns) = slice(name, shape, Shard::new(index, count)?)?;
                Ok((rows.len() * columns.len()) as u64)
            });
            most = most.max(held.sum::<Result<u64>>()?);
        }
        let share = most as f64 / config.num_parameters() as f64;
        println!("tp {count}: {most} numbers a rank, {share:.4} of all");
        // Every rank has the norms and the bias tables of its heads.
        ensure!(share - 1.0 / count as f64 <= 1e-4, "{share}");
    }
    Ok(())
}

/// A file of T5-XXL's size that holds nothing but its table of contents: the system stores no page of what was never written.
#[test]
fn the_loader_counts_the_11135332352_parameters_of_an_xxl_file() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let config = Config::preset("xxl").context("a known shape")?;
    let (mut table, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in config.tensors() {
        let start = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        table.insert(
            name,
            serde_json::json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }),
        );
    }
    let table = serde_json::to_vec(&table)?;
    let mut file = std::fs::File::create(dir.path().join("model.safetensors"))?;
    file.write_all(&(table.len() as u64).to_le_bytes())?;
    file.write_all(&table)?;
    file.set_len(8 + table.len() as u64 + end)?;
    let checkpoint = Checkpoint::open(dir.path(), DType::BF16)?;
    ensure!(checkpoint.num_parameters() == 11_135_332_352, "{}", checkpoint.num_parameters());
    let results = on_threads(Mesh::new(8, 1, 8)?, None, &Default::default(), |ranks| -> Result<u64> {
        let own = Checkpoint::open(dir.path(), DType::BF16)?;
        T5::load_on(config.clone(), &own, DType::BF16, &TensorAxis::of(&ranks), &Device::Cpu)?;
        Ok(own.bytes_read())
    });
    for read in results {
        let share = read? as f64 / end as f64;
        ensure!(share < 0.126, "one of eight reads {share} of the file");
    }
    Ok(())
}
