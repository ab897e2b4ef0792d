//! Made-up weights are a function of their seed.

use candle_core::DType;
use incipit_weights::{Random, RandomTensor, Source};

use crate::support::says;

fn tensors(names: &[&str], shape: &[usize], deviation: f32) -> Vec<RandomTensor> {
    let of =
        |name: &&str| RandomTensor { name: (*name).to_owned(), shape: shape.to_vec(), mean: 0.0, deviation };
    names.iter().map(of).collect()
}

fn values(seed: u64, dtype: DType, name: &str) -> Vec<f32> {
    let shape = [700, 801];
    let random = Random::new(tensors(&["a", "b"], &shape, 0.05), dtype, seed).unwrap();
    random.frozen(name, &shape).unwrap().to_f32()
}

#[test]
fn a_seed_and_a_name_give_the_same_numbers_every_time() {
    assert_eq!(values(3, DType::F32, "a"), values(3, DType::F32, "a"));
    assert_ne!(values(3, DType::F32, "a"), values(3, DType::F32, "b"));
    assert_ne!(values(3, DType::F32, "a"), values(4, DType::F32, "a"));
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let with = |threads| pool(threads).install(|| values(9, DType::BF16, "a"));
    assert_eq!(with(1), with(5));
}

#[test]
fn numbers_have_the_mean_and_deviation_asked_for() {
    let seed = 5;
    println!("seed {seed}");
    let values = values(seed, DType::F32, "a");
    let count = values.len() as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
    let deviation = (values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count).sqrt();
    assert!(mean.abs() < 5.0 * 0.05 / count.sqrt(), "mean {mean}");
    assert!((deviation / 0.05 - 1.0).abs() < 0.005, "deviation {deviation}");
    let neighbours = values.windows(2).map(|w| f64::from(w[0]) * f64::from(w[1])).sum::<f64>() / count;
    assert!(neighbours.abs() < 5.0 * 0.0025 / count.sqrt(), "correlation {neighbours}");
}

#[test]
fn no_deviation_gives_the_mean() {
    let norm = RandomTensor { name: "norm".to_owned(), shape: vec![9], mean: 1.0, deviation: 0.0 };
    let random = Random::new(vec![norm], DType::BF16, 0).unwrap();
    assert_eq!(random.frozen("norm", &[9]).unwrap().to_f32(), vec![1.0; 9]);
}

#[test]
fn bf16_weights_are_the_f32_weights_rounded() {
    let rounded = values(2, DType::F32, "a").into_iter().map(|x| half::bf16::from_f32(x).to_f32());
    assert_eq!(values(2, DType::BF16, "a"), rounded.collect::<Vec<_>>());
}

#[test]
fn wrong_names_shapes_and_types_are_refused() {
    let random = Random::new(tensors(&["shared.weight"], &[2, 3], 1.0), DType::F32, 0).unwrap();
    says(
        &random.frozen("shared.weights", &[2, 3]).unwrap_err().to_string(),
        &["similar names there: shared.weight;"],
    );
    says(&random.frozen("shared.weight", &[3, 3]).unwrap_err().to_string(), &["[2, 3]", "[3, 3]"]);
    says(&Random::new(Vec::new(), DType::F16, 0).unwrap_err().to_string(), &["F16", "bf16 or f32"]);
}
