//! Operands that do not fit are refused with an error that says what was expected.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{frozen, matrix, vector};
use crate::{
    Activation, Attention, Buckets, Dropout, Frozen, LossSlope, PositionBias, Result, Rows, Segments,
    Softmax, Targets, Vocabulary, activate, add, attention, attention_gradient, attention_gradient_with_bias,
    cross_entropy_gradient, dropout, embed, embed_gradient, gated, gated_gradient, linear, linear_add,
    linear_gradient, linear_gradient_add, linear_weight_gradient, rms_norm, rms_norm_gradient,
    rms_norm_weight_gradient, rounded,
};

/// The message of an error; fails if there is none.
fn refusal<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("the operands were taken"),
        Err(error) => error.to_string(),
    }
}

fn ones(rows: usize, cols: usize, dtype: DType) -> Tensor {
    matrix(&vec![1.0; rows * cols], rows, cols, dtype)
}

#[test]
fn linear_layers_refuse_other_shapes_and_types() {
    let w = frozen(&[1.0; 6], 3, 2, DType::F32);
    let x = ones(4, 2, DType::F32);
    let message = refusal(linear(&ones(4, 3, DType::F32), &w, DType::F32));
    assert_eq!(message, "linear: rows of 3 numbers for a weight whose in is 2");
    assert!(refusal(linear(&x, &w, DType::F16)).contains("not F16"));
    assert!(refusal(linear(&x.to_dtype(DType::F16).unwrap(), &w, DType::F32)).contains("not F16"));
    assert!(refusal(linear(&vector(&[1.0, 1.0]), &w, DType::F32)).contains("no matrix"));
    let turned = ones(2, 4, DType::F32).t().unwrap();
    assert!(refusal(linear(&turned, &w, DType::F32)).contains("not contiguous"));
    assert!(refusal(linear_add(&ones(4, 2, DType::F32), &x, &w)).contains("[4, 3] is expected"));
    refusal(linear_add(&ones(4, 3, DType::BF16), &x, &w));
    let (dy, other) = (ones(4, 3, DType::F32), frozen(&[1.0; 9], 3, 3, DType::F32));
    assert!(refusal(linear_gradient(&[], DType::F32)).contains("no term"));
    assert!(refusal(linear_gradient(&[(&dy, &w), (&dy, &other)], DType::F32)).contains("differ"));
    assert!(
        refusal(linear_gradient(&[(&dy, &w), (&ones(5, 3, DType::F32), &w)], DType::F32)).contains("differ")
    );
    assert!(
        refusal(linear_gradient(&[(&dy, &w), (&ones(4, 3, DType::BF16), &w)], DType::F32)).contains("differ")
    );
    assert!(
        refusal(linear_gradient(&[(&ones(4, 2, DType::F32), &w)], DType::F32)).contains("whose out is 3")
    );
    assert!(refusal(linear_gradient_add(&x, &[])).contains("no term"));
    assert!(refusal(linear_gradient_add(&dy, &[(&dy, &w)])).contains("[4, 2] is expected"));
    let message = refusal(linear_weight_gradient(&ones(5, 3, DType::F32), &x));
    assert!(message.contains("5 rows of F32 for an input of 4 rows of F32"), "{message}");
    assert!(refusal(linear_weight_gradient(&ones(4, 3, DType::BF16), &x)).contains("rows of BF16"));
    let half = ones(4, 3, DType::F16);
    assert!(refusal(linear_weight_gradient(&half, &half)).contains("not F16"));
    assert!(refusal(linear_weight_gradient(&vector(&[1.0]), &x)).contains("no matrix"));
}

#[test]
fn elementwise_operations_refuse_other_shapes_and_types() {
    let (x, half) = (ones(2, 3, DType::F32), ones(2, 3, DType::F16));
    let weight = vector(&[1.0; 3]);
    refusal(rms_norm(&x, &vector(&[1.0; 2]), 1e-6, DType::F32));
    refusal(rms_norm(&x, &weight, 1e-6, DType::F16));
    refusal(rms_norm(&half, &weight, 1e-6, DType::F32));
    refusal(rms_norm_gradient(&ones(3, 3, DType::F32), &x, &weight, 1e-6, None, DType::F32));
    refusal(rms_norm_gradient(&x, &x, &weight, 1e-6, None, DType::F16));
    refusal(rms_norm_gradient(&x, &x, &weight, 1e-6, Some(&ones(2, 2, DType::F32)), DType::F32));
    refusal(rms_norm_weight_gradient(&ones(2, 4, DType::F32), &x, 1e-6));
    refusal(rms_norm_weight_gradient(&x, &half, 1e-6));
    refusal(rms_norm_weight_gradient(&half, &x, 1e-6));
    assert!(refusal(activate(Activation::Silu, &half)).contains("not F16"));
    refusal(gated(Activation::Silu, &x, &ones(2, 4, DType::F32)));
    refusal(gated(Activation::Silu, &x, &ones(2, 3, DType::BF16)));
    refusal(gated_gradient(Activation::Silu, &ones(1, 3, DType::F32), &x, &x));
    refusal(add(&x, &ones(2, 2, DType::F32)));
    refusal(rounded(&x, DType::F16));
    let segments = Segments::new([2]);
    refusal(dropout(&half, &segments, &Dropout::new(0.1, vec![1]).unwrap()));
    refusal(dropout(&x, &Segments::new([3]), &Dropout::new(0.1, vec![1]).unwrap()));
    assert!(refusal(dropout(&x, &segments, &Dropout::new(0.1, vec![1, 2]).unwrap())).contains("2 examples"));
    for rate in [-0.1, 1.0, f32::NAN] {
        assert!(refusal(Dropout::new(rate, vec![])).contains("is not in [0, 1)"));
    }
}

#[test]
fn losses_refuse_targets_outside_of_the_vocabulary() {
    let logits = ones(2, 3, DType::F32);
    let of = |ids: &'static [u32]| Targets { ids, vocabulary: Vocabulary::whole(3) };
    let outside = refusal(Softmax::new(&logits, of(&[0, 3])));
    assert_eq!(outside, "softmax: target 3 is outside of a vocabulary of 3");
    assert!(refusal(Softmax::new(&logits, of(&[0]))).contains("2 rows of logits for 1 targets"));
    refusal(Softmax::new(&logits.to_dtype(DType::BF16).unwrap(), of(&[0, 1])));
    let beyond = Targets { ids: &[0, 1], vocabulary: Vocabulary { first: 1, size: 3 } };
    assert!(refusal(Softmax::new(&logits, beyond)).contains("3 columns from 1 on"));
    let normalisers = Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap();
    let slope = |scale| LossSlope { normalisers: &normalisers, scale, z_loss: 0.0 };
    refusal(cross_entropy_gradient(&logits, of(&[0, 1]), slope(&[1.0]), DType::F32));
    refusal(cross_entropy_gradient(&logits, of(&[0, 1]), slope(&[1.0; 2]), DType::F16));
}

#[test]
fn embeddings_refuse_what_is_not_there() {
    let (table, all) = (frozen(&[1.0; 8], 4, 2, DType::F32), Vocabulary::whole(4));
    let prompt = ones(3, 2, DType::F32);
    assert!(refusal(embed(&table, all, &[], &[Rows::Tokens(&[0, 4])])).contains("token 4 is outside"));
    assert!(
        refusal(embed(&table, all, std::slice::from_ref(&prompt), &[Rows::Prompt(1)]))
            .contains("no prompt 1")
    );
    assert!(
        refusal(embed(&table, all, &[ones(3, 3, DType::F32)], &[Rows::Prompt(0)]))
            .contains("rows of 3 numbers")
    );
    refusal(embed(&table, all, &[ones(3, 2, DType::BF16)], &[Rows::Prompt(0)]));
    let dx = ones(2, 3, DType::F32);
    let of = |ids: &[Option<u32>], rows| refusal(embed_gradient(&dx, ids, all, rows));
    assert_eq!(of(&[None, Some(4)], 4), "embed_gradient: token 4 is outside of a vocabulary of 4");
    assert!(of(&[None], 4).contains("2 rows of gradients for 1 tokens"));
    assert!(of(&[None, None], 5).contains("5 rows from 0 on of a vocabulary of 4"));
    refusal(embed_gradient(&dx.to_dtype(DType::BF16).unwrap(), &[None, None], all, 4));
}

#[test]
fn attention_refuses_what_does_not_fit() {
    let (two, three) = (Segments::new([2]), Segments::new([3]));
    let spec = Attention {
        queries: &two,
        keys: &three,
        heads: 2,
        bias: None,
        causal: false,
        prefix: 0,
        dropout: None,
    };
    let (q, k) = (ones(2, 4, DType::F32), ones(3, 4, DType::F32));
    let attended = attention(&spec, &q, &k, &k).unwrap();
    refusal(attention_gradient(&spec, [&q, &k, &k], &attended, &k));
    let other = Attention { heads: 1, ..spec };
    assert!(refusal(attention_gradient(&other, [&q, &k, &k], &attended, &q)).contains("normalisers"));
    assert!(refusal(attention(&Attention { heads: 0, ..spec }, &q, &k, &k)).contains("0 heads"));
    assert!(refusal(attention(&Attention { heads: 3, ..spec }, &q, &k, &k)).contains("3 heads"));
    refusal(attention(&spec, &k, &k, &k));
    refusal(attention(&spec, &q, &q, &k));
    refusal(attention(&spec, &q, &k, &ones(3, 4, DType::BF16)));
    refusal(attention(&spec, &q.to_dtype(DType::F16).unwrap(), &k, &k));
    let cut = Segments::new([1, 2]);
    assert!(refusal(attention(&Attention { keys: &cut, ..spec }, &q, &k, &k)).contains("2 examples"));
    let message = refusal(attention(&Attention { prefix: 4, ..spec }, &q, &k, &k));
    assert!(message.contains("example 0 has 3 keys, of which 4 are a prefix"), "{message}");
    let buckets = Buckets { count: 2, max_distance: 4, bidirectional: false };
    let with_bias = |spec: &Attention<'_>| {
        refusal(attention_gradient_with_bias(spec, [&q, &k, &k], &attended, &q, buckets))
    };
    assert_eq!(with_bias(&spec), "attention_gradient_with_bias: there is no position bias");
    let table = frozen(&[0.0; 4], 2, 2, DType::F32);
    let other = PositionBias::new(&table, Buckets { max_distance: 5, ..buckets }, 3).unwrap();
    let message = with_bias(&Attention { bias: Some(&other), ..spec });
    assert!(message.contains("max_distance: 5"), "{message}");
    let masks = Dropout::new(0.1, vec![]).unwrap();
    let message = refusal(attention(&Attention { dropout: Some(&masks), ..spec }, &q, &k, &k));
    assert!(message.contains("dropout for 0 examples"), "{message}");
    let buckets = Buckets { count: 4, max_distance: 8, bidirectional: true };
    let table = frozen(&[0.0; 8], 4, 2, DType::F32);
    let short = PositionBias::new(&table, buckets, 2).unwrap();
    assert!(
        refusal(attention(&Attention { bias: Some(&short), ..spec }, &q, &k, &k)).contains("3 are needed")
    );
    refusal(PositionBias::new(&table, Buckets { count: 5, ..buckets }, 2));
    refusal(PositionBias::new(&frozen(&[0.0], 1, 1, DType::F32), Buckets { count: 1, ..buckets }, 2));
}

#[test]
fn frozen_weights_are_bf16_or_f32_and_lie_within_their_bytes() {
    let bytes: Arc<Vec<u8>> = Arc::new(vec![0; 64]);
    let map = |offset, dtype, rows, cols| Frozen::mapped(bytes.clone(), offset, dtype, rows, cols);
    assert!(map(0, DType::F32, 4, 4).is_ok() && map(64, DType::F32, 0, 4).is_ok());
    assert!(refusal(map(0, DType::F16, 1, 1)).contains("not F16"));
    assert!(refusal(map(4, DType::F32, 4, 4)).contains("64 bytes at offset 4"));
    refusal(map(0, DType::BF16, usize::MAX, 2));
    refusal(map(usize::MAX, DType::BF16, 1, 1));
    let w = map(0, DType::F32, 4, 4).unwrap();
    let none = w.part((4, 0), (1, 3));
    assert_eq!((none.rows(), none.to_f32()), (0, vec![]));
    let y = linear(&Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap(), &none, DType::F32).unwrap();
    assert_eq!(y.dims(), [2, 0]);
}
