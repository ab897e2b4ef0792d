//! What comes out.

use candle_core::{DType, Device, Tensor};
use half::bf16;
use incipit_collective::{Axis, Collective, Ranks, Reduce, broadcast_bytes, gather_bytes, pairs};

use super::random;

const SIZES: [usize; 5] = [0, 1, 7, 1000, 100_000];
const SEED: u64 = 20_221_122;

/// Any f32 of a useful size, of either sign.
fn float(rank: usize, i: usize) -> f32 {
    let bits = random(SEED + rank as u64, i);
    let exponent = 100 + (bits >> 32) as u32 % 40;
    f32::from_bits((bits as u32 & 0x807f_ffff) | exponent << 23)
}

fn floats(rank: usize, size: usize) -> Vec<f32> {
    (0..size).map(|i| float(rank, i)).collect()
}

fn integers(rank: usize, size: usize) -> Vec<i64> {
    // All that there are, so that sums wrap around.
    (0..size).map(|i| random(SEED + rank as u64, i) as i64).collect()
}

/// FNV-1a over the bytes: what ranks and backends compare.
fn digest(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

fn expect_f32(sum: &Tensor, expected: &[f32], what: &str) -> u64 {
    let sum = sum.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(sum.len(), expected.len(), "{what}");
    for (i, (a, b)) in sum.iter().zip(expected).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: {a} instead of {b} at {i}, seed {SEED}");
    }
    digest(sum.iter().flat_map(|x| x.to_le_bytes()))
}

/// Everybody's numbers put together one by one, the ranks in their order.
fn reduced<T: Copy>(ranks: &[Vec<T>], combine: impl Fn(T, T) -> T) -> Vec<T> {
    (0..ranks[0].len())
        .map(|i| ranks[1..].iter().fold(ranks[0][i], |sum, other| combine(sum, other[i])))
        .collect()
}

pub(crate) fn reductions(ranks: Ranks) -> String {
    let (group, rank, size) = (ranks.world(), ranks.rank(), ranks.mesh().world());
    let cpu = Device::Cpu;
    let mut digests = Vec::new();
    for n in SIZES {
        let all: Vec<_> = (0..size).map(|r| floats(r, n)).collect();
        let x = Tensor::from_slice(&all[rank], n, &cpu).unwrap();
        let (sum, max) = (reduced(&all, |a, b| a + b), reduced(&all, f32::max));
        digests.push(expect_f32(&group.all_reduce(&x, Reduce::Sum).unwrap(), &sum, "f32 sum"));
        digests.push(expect_f32(&group.all_reduce(&x, Reduce::Max).unwrap(), &max, "f32 max"));

        let all: Vec<Vec<_>> =
            all.iter().map(|xs| xs.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()).collect();
        let x = Tensor::from_slice(&all[rank], n, &cpu).unwrap().to_dtype(DType::BF16).unwrap();
        let (sum, max) = (reduced(&all, |a, b| a + b), reduced(&all, f32::max));
        let sum: Vec<_> = sum.into_iter().map(|s| bf16::from_f32(s).to_f32()).collect();
        for (reduce, expected) in [(Reduce::Sum, sum), (Reduce::Max, max)] {
            let result = group.all_reduce(&x, reduce).unwrap();
            assert_eq!(result.dtype(), DType::BF16);
            digests.push(expect_f32(&result.to_dtype(DType::F32).unwrap(), &expected, "bf16"));
        }

        let all: Vec<_> = (0..size).map(|r| integers(r, n)).collect();
        let x = Tensor::from_slice(&all[rank], n, &cpu).unwrap();
        for (reduce, expected) in
            [(Reduce::Sum, reduced(&all, i64::wrapping_add)), (Reduce::Max, reduced(&all, i64::max))]
        {
            let result = group.all_reduce(&x, reduce).unwrap().to_vec1::<i64>().unwrap();
            assert_eq!(result, expected, "i64 {reduce:?} of {n}, seed {SEED}");
        }
    }
    for poisoned in 0..size {
        for dtype in [DType::F32, DType::BF16] {
            // Few enough to travel in the frame, and more.
            for n in [2, 2000] {
                let mut numbers = vec![rank as f32; n];
                numbers[n - 1] = if rank == poisoned { f32::NAN } else { 1.0 };
                let x = Tensor::new(numbers, &cpu).unwrap().to_dtype(dtype).unwrap();
                let max = group.all_reduce(&x, Reduce::Max).unwrap();
                let max = max.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
                assert!(max[n - 1].is_nan() && max[0] == (size - 1) as f32, "{dtype:?} {n} {poisoned}");
            }
        }
    }
    format!("{digests:?}")
}

pub(crate) fn moves(ranks: Ranks) -> String {
    let (group, rank, size) = (ranks.world(), ranks.rank(), ranks.mesh().world());
    let mut digests = Vec::new();
    for n in SIZES {
        // Rows of a tensor that does not lie in one piece.
        let mine = |r: usize| {
            let x = Tensor::from_vec(floats(r, 3 * n), (3, n), &Device::Cpu).unwrap();
            x.t().unwrap()
        };
        let whole = Tensor::cat(&(0..size).map(mine).collect::<Vec<_>>(), 0).unwrap();
        for dtype in [DType::F32, DType::BF16, DType::I64, DType::U8] {
            let x = mine(rank).to_dtype(dtype).unwrap();
            let numbers = |x: &Tensor| {
                let x = x.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
                x.to_vec1::<f32>().unwrap()
            };
            let gathered = group.all_gather(&x).unwrap();
            assert_eq!((gathered.dims(), gathered.dtype()), ([size * n, 3].as_slice(), dtype));
            let expected = numbers(&whole.to_dtype(dtype).unwrap());
            digests.push(expect_f32(&gathered.to_dtype(DType::F32).unwrap(), &expected, "all-gather"));
            for root in 0..size {
                let sent = group.broadcast(&x, root).unwrap();
                assert_eq!((sent.dims(), sent.dtype()), ([n, 3].as_slice(), dtype));
                let expected = numbers(&mine(root).to_dtype(dtype).unwrap());
                digests.push(expect_f32(&sent.to_dtype(DType::F32).unwrap(), &expected, "broadcast"));
            }
        }
        group.barrier().unwrap();
    }
    format!("{digests:?}")
}

pub(crate) fn bytes(ranks: Ranks) -> String {
    let (group, rank, size) = (&**ranks.world(), ranks.rank(), ranks.mesh().world());
    let mine = |r: usize, n: usize| (0..n * (r + 1) % 5003).map(|i| (i * (r + 7)) as u8).collect::<Vec<_>>();
    for n in [0, 1, 1000, 5000, 70_000] {
        let all = gather_bytes(group, &mine(rank, n)).unwrap();
        assert_eq!(all, (0..size).map(|r| mine(r, n)).collect::<Vec<_>>());
        for root in 0..size {
            assert_eq!(broadcast_bytes(group, &mine(rank, n), root).unwrap(), mine(root, n));
        }
    }
    String::new()
}

/// Were it not by rank, 1e8 and -1e8 would cancel at another time; were it by place, the places would differ.
pub(crate) fn order_of_a_sum(ranks: Ranks) -> String {
    let (size, n) = (ranks.mesh().world(), 10_007);
    let terms = [1e8f32, -1e8, 1.25, 3e7];
    let x = Tensor::full(terms[ranks.rank()], n, &Device::Cpu).unwrap();
    let expected = terms[1..size].iter().fold(terms[0], |sum, term| sum + term);
    let sum = ranks.world().all_reduce(&x, Reduce::Sum).unwrap();
    expect_f32(&sum, &vec![expected; n], "one sum at every place").to_string()
}

pub(crate) fn groups(ranks: Ranks) -> String {
    let x = Tensor::new(&[1i64 << (8 * ranks.rank())], &Device::Cpu).unwrap();
    let sum =
        |group: &dyn Collective| group.all_reduce(&x, Reduce::Sum).unwrap().to_vec1::<i64>().unwrap()[0];
    let bits = |ranks: &[usize]| ranks.iter().map(|r| 1i64 << (8 * r)).sum::<i64>();
    let (mesh, rank) = (ranks.mesh(), ranks.rank());
    for (group, axis) in [(ranks.tensor(), Axis::Tensor), (ranks.data(), Axis::Data)] {
        assert_eq!(sum(&**group), bits(&mesh.group(rank, axis)), "{axis:?}");
        assert_eq!((group.rank(), group.size()), (ranks.shard(axis).index(), ranks.shard(axis).count()));
    }
    let world = sum(&**ranks.world());
    assert_eq!(world, bits(&(0..mesh.world()).collect::<Vec<_>>()));
    assert_eq!((ranks.world().rank(), ranks.leads()), (rank, rank == 0));
    world.to_string()
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    let product = (a.to_dtype(DType::F64).unwrap() * b.to_dtype(DType::F64).unwrap()).unwrap();
    product.sum_all().unwrap().to_scalar().unwrap()
}

/// A matrix that every rank can make.
fn matrix(seed: usize, rows: usize, columns: usize) -> Tensor {
    let numbers =
        (0..rows * columns).map(|i| random(SEED + seed as u64, i) as u32 as f32 / 2f32.powi(32) - 0.5);
    Tensor::from_iter(numbers, &Device::Cpu).unwrap().reshape((rows, columns)).unwrap()
}

/// The pairs around a region: y = sum over ranks of relu(x A_r) B_r. Its gradient to x, and the gradients of the two
/// maps alone, against dot products and differences in f64.
pub(crate) fn pairs(ranks: Ranks) -> String {
    let (group, rank, size) = (&**ranks.world(), ranks.rank(), ranks.mesh().world());
    // <g(x), dy> summed over what every rank gives must be <x, g'(dy)> summed alike: g is a sum over ranks.
    let (x, dy) = (matrix(10 + rank, 30, 40), matrix(3, 30, 40));
    let y = pairs::reduce_from_region(group, &x).unwrap();
    let terms = dot(&x, &pairs::reduce_from_region_gradient(&dy));
    let terms = Tensor::new(&[(terms * 2f64.powi(40)) as i64], &Device::Cpu).unwrap();
    let terms =
        group.all_reduce(&terms, Reduce::Sum).unwrap().to_vec1::<i64>().unwrap()[0] as f64 / 2f64.powi(40);
    assert!((dot(&y, &dy) - terms).abs() < 1e-5, "{} and {terms}", dot(&y, &dy));
    // The other one copies one x to all ranks: <f(x), dy_r> summed over ranks is <x, f'(dy)>.
    let (x, dy) = (matrix(4, 30, 40), |r: usize| matrix(50 + r, 30, 40));
    let dx = pairs::copy_to_region_gradient(group, &dy(rank)).unwrap();
    let copies: f64 = (0..size).map(|r| dot(&pairs::copy_to_region(&x), &dy(r))).sum();
    assert!((dot(&x, &dx) - copies).abs() < 1e-5, "{} and {copies}", dot(&x, &dx));

    let (inner, outer) = (|r| matrix(100 + r, 6, 5), |r| matrix(200 + r, 5, 6));
    let (x, dy) = (matrix(5, 4, 6), matrix(6, 4, 6));
    let entered = pairs::copy_to_region(&x);
    let hidden = entered.matmul(&inner(rank)).unwrap();
    let y = hidden.relu().unwrap().matmul(&outer(rank)).unwrap();
    let y = pairs::reduce_from_region(group, &y).unwrap();
    let dy_inside = pairs::reduce_from_region_gradient(&dy);
    let dhidden = dy_inside.matmul(&outer(rank).t().unwrap()).unwrap();
    let dhidden = (dhidden * hidden.gt(0f32).unwrap().to_dtype(DType::F32).unwrap()).unwrap();
    let dx =
        pairs::copy_to_region_gradient(group, &dhidden.matmul(&inner(rank).t().unwrap()).unwrap()).unwrap();

    // The same function in f64 on one rank, and its differences.
    let loss = |x: &Tensor| -> f64 {
        (0..size)
            .map(|r| {
                let [a, b] = [inner(r), outer(r)].map(|m| m.to_dtype(DType::F64).unwrap());
                dot(&x.matmul(&a).unwrap().relu().unwrap().matmul(&b).unwrap(), &dy)
            })
            .sum()
    };
    let x64 = x.to_dtype(DType::F64).unwrap();
    assert!((loss(&x64) - dot(&y, &dy)).abs() < 1e-5);
    let dx = dx.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (i, dx) in dx.iter().enumerate() {
        let step: Vec<_> = (0..24).map(|j| if i == j { 1e-5f64 } else { 0.0 }).collect();
        let step = Tensor::from_vec(step, (4, 6), &Device::Cpu).unwrap();
        let difference = (loss(&(&x64 + &step).unwrap()) - loss(&(&x64 - &step).unwrap())) / 2e-5;
        assert!((difference - f64::from(*dx)).abs() < 1e-5, "{difference} and {dx} at {i}, seed {SEED}");
    }
    digest(dx.iter().flat_map(|x| x.to_le_bytes())).to_string()
}
