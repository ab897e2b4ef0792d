//! Sums of tensors of the device, which are to have the bits that they have in main memory.

use super::*;

/// Numbers of sizes far apart, of which each order of addition makes another sum.
fn numbers(rank: usize, n: usize, dtype: DType) -> Tensor {
    let number = |i: usize| {
        let [digits, power] = [0, 100].map(|seed| suite::random(seed + rank as u64, i));
        ((digits % 2001) as f32 - 1000.0) * 10f32.powi((power % 9) as i32 - 4)
    };
    let x = Tensor::from_iter((0..n).map(number), &Device::Cpu).unwrap();
    x.to_dtype(dtype).unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    let x = x.flatten_all().unwrap().to_dtype(DType::F32).unwrap();
    x.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn sums_on_the_device_have_the_bits_of_main_memory() {
    for (size, dtype) in
        [(2, DType::F32), (3, DType::F32), (4, DType::BF16), (5, DType::F32), (2, DType::BF16)]
    {
        println!("{size} ranks, {dtype:?}");
        each(size, LONG, &Arc::default(), |group| {
            for dims in [(1, 1), (7, 1), (4, 5), (100, 13)] {
                let x = numbers(group.rank(), dims.0 * dims.1, dtype).reshape(dims).unwrap();
                let device = group.all_reduce(&x, Reduce::Sum).unwrap();
                synchronize(&group);
                group.line().lane().stands.store(false, Ordering::SeqCst);
                let host = group.all_reduce(&x, Reduce::Sum).unwrap();
                group.line().lane().stands.store(true, Ordering::SeqCst);
                assert_eq!((device.dims(), device.dtype()), (x.dims(), dtype));
                assert_eq!(bits(&device), bits(&host), "{dims:?}");
            }
        });
    }
}

#[test]
fn a_row_has_the_same_sum_wherever_it_lies_in_a_batch() {
    each(4, LONG, &Arc::default(), |group| {
        let (row, others) = (numbers(group.rank(), 6, DType::F32), numbers(group.rank() + 9, 18, DType::F32));
        let (row, others) = (row.reshape((1, 6)).unwrap(), others.reshape((3, 6)).unwrap());
        let sum = |rows: &[&Tensor], place: usize| {
            let sum = group.all_reduce(&Tensor::cat(rows, 0).unwrap(), Reduce::Sum).unwrap();
            synchronize(&group);
            bits(&sum.get(place).unwrap())
        };
        let alone = sum(&[&row], 0);
        assert_eq!(sum(&[&row, &others], 0), alone);
        assert_eq!(sum(&[&others, &row], 3), alone);
        let [first, last] = [others.narrow(0, 0, 1).unwrap(), others.narrow(0, 1, 2).unwrap()];
        assert_eq!(sum(&[&first, &row, &last], 1), alone);
    });
}
