use super::*;
use incipit_kernels::rng::Philox;

const SEED: u64 = 11;

fn numbers(stream: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut g = Philox::new(SEED, &[stream]);
    (0..len).map(|_| g.normal() * scale).collect()
}

fn kinds() -> [OptimizerKind; 5] {
    [
        OptimizerKind::adafactor(1e-5, 0),
        OptimizerKind::adafactor(1e-5, 1_100_000),
        OptimizerKind::adamw(0.01),
        OptimizerKind::sgd(0.9, 1e-4),
        OptimizerKind::sgd(0.0, 0.0),
    ]
}

/// The definition, in f64, as plainly as it can be written.
struct PlainAdafactor {
    v: Vec<f64>,
    v_row: Vec<f64>,
    v_col: Vec<f64>,
    factored: bool,
}

impl PlainAdafactor {
    fn new(rows: usize, cols: usize) -> Self {
        let factored = rows >= 128 && cols >= 128;
        Self { v: vec![0.0; rows * cols], v_row: vec![0.0; rows], v_col: vec![0.0; cols], factored }
    }

    fn step(&mut self, x: &mut [f64], g: &[f32], t: f64, lr: f64) {
        let (rows, cols) = (self.v_row.len(), self.v_col.len());
        let b = 1.0 - t.powf(-0.8);
        let square = |i: usize, j: usize| f64::from(g[i * cols + j]).powi(2) + 1e-30;
        for i in 0..rows {
            let mean = (0..cols).map(|j| square(i, j)).sum::<f64>() / cols as f64;
            self.v_row[i] = b * self.v_row[i] + (1.0 - b) * mean;
        }
        for j in 0..cols {
            let mean = (0..rows).map(|i| square(i, j)).sum::<f64>() / rows as f64;
            self.v_col[j] = b * self.v_col[j] + (1.0 - b) * mean;
        }
        let row_mean = self.v_row.iter().sum::<f64>() / rows as f64;
        let mut u = vec![0.0; rows * cols];
        for i in 0..rows {
            for j in 0..cols {
                let k = i * cols + j;
                self.v[k] = b * self.v[k] + (1.0 - b) * square(i, j);
                let v = if self.factored { self.v_row[i] / row_mean * self.v_col[j] } else { self.v[k] };
                u[k] = f64::from(g[k]) / v.sqrt();
            }
        }
        let rms = (u.iter().map(|u| u * u).sum::<f64>() / u.len() as f64).sqrt();
        for (x, u) in x.iter_mut().zip(u) {
            *x = *x * (1.0 - 1e-5) - lr * u / rms.max(1.0);
        }
    }
}

fn assert_adafactor_follows_the_definition(rows: usize, cols: usize, offset: u64) {
    let mut x = numbers(0, rows * cols, 1.0);
    let mut plain_x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    let mut optimizer = Optimizer::new(&OptimizerKind::adafactor(1e-5, offset), rows, cols);
    let mut plain = PlainAdafactor::new(rows, cols);
    for step in 1..=20 {
        let g = numbers(step, rows * cols, 1e-3 * step as f32);
        optimizer.step(&mut x, &g, 0.3);
        plain.step(&mut plain_x, &g, (step + offset) as f64, 0.3);
    }
    let worst = x.iter().zip(&plain_x).map(|(x, y)| (f64::from(*x) - y).abs()).fold(0.0, f64::max);
    assert!(worst < 2e-5, "{rows} x {cols}, offset {offset}, seed {SEED}: off by {worst}");
}

#[test]
fn adafactor_follows_its_definition_unfactored() {
    assert_adafactor_follows_the_definition(20, 64, 0);
    assert_adafactor_follows_the_definition(127, 130, 0);
    assert_adafactor_follows_the_definition(130, 127, 0);
}

#[test]
fn adafactor_follows_its_definition_factored() {
    assert_adafactor_follows_the_definition(128, 128, 0);
    assert_adafactor_follows_the_definition(150, 130, 0);
}

#[test]
fn adafactor_follows_its_definition_with_the_released_codes_counter() {
    assert_adafactor_follows_the_definition(4, 8, 1_100_000);
    assert_adafactor_follows_the_definition(128, 129, 1_100_000);
}

#[test]
fn adafactor_factors_where_both_dimensions_reach_128() {
    let names = |rows, cols| {
        let state = Optimizer::new(&OptimizerKind::adafactor(0.0, 0), rows, cols).state();
        state.into_iter().map(|t| (t.name, t.shape)).collect::<Vec<_>>()
    };
    assert_eq!(names(100, 4096), [("v".to_owned(), vec![100, 4096])]);
    assert_eq!(names(150, 64), [("v".to_owned(), vec![150, 64])]);
    assert_eq!(names(128, 512), [("v_row".to_owned(), vec![128]), ("v_col".to_owned(), vec![512])]);
}

#[test]
fn adafactors_first_step_moves_each_element_by_the_learning_rate() {
    let mut x = vec![0.0; 6];
    let g = [1e-12, -3e-3, 5.0, -1e8, 2.0, -0.25];
    Optimizer::new(&OptimizerKind::adafactor(1e-5, 0), 2, 3).step(&mut x, &g, 0.3);
    for (x, g) in x.iter().zip(g) {
        assert!((x + 0.3 * g.signum()).abs() < 1e-6, "{x} for the gradient {g}");
    }
}

#[test]
fn adafactors_weight_decay_does_not_depend_on_the_learning_rate() {
    for lr in [0.0, 0.3] {
        let mut x = vec![100.0; 4];
        Optimizer::new(&OptimizerKind::adafactor(1e-2, 0), 2, 2).step(&mut x, &[0.0; 4], lr);
        assert_eq!(x, [99.0; 4]);
    }
}

#[test]
fn a_gradient_of_zeros_leaves_the_prompt_finite() {
    for kind in kinds() {
        for (rows, cols) in [(2, 3), (128, 128)] {
            let mut x = vec![1.0; rows * cols];
            let mut optimizer = Optimizer::new(&kind, rows, cols);
            for _ in 0..3 {
                optimizer.step(&mut x, &vec![0.0; rows * cols], 0.3);
            }
            assert!(x.iter().all(|x| (0.98..=1.0).contains(x)), "{kind:?} at {rows} x {cols}: {}", x[0]);
        }
    }
}

#[test]
fn sgd_adds_momentum_and_weight_decay_as_torch_does() {
    let mut x = vec![1.0];
    let mut sgd = Optimizer::new(&OptimizerKind::sgd(0.5, 0.25), 1, 1);
    sgd.step(&mut x, &[0.75], 0.5); // direction 0.75 + 0.25 = 1
    assert_eq!(x, [0.5]);
    sgd.step(&mut x, &[0.375], 0.5); // direction 0.5 + (0.375 + 0.125) = 1
    assert_eq!(x, [0.0]);
}

#[test]
fn adamws_first_step_moves_each_element_by_the_learning_rate() {
    let mut x = vec![2.0, 2.0];
    Optimizer::new(&OptimizerKind::adamw(0.1), 1, 2).step(&mut x, &[1e-3, -10.0], 0.5);
    // 2 (1 - 0.5 · 0.1) = 1.9, then 0.5 against the gradient.
    assert!((x[0] - 1.4).abs() < 1e-4 && (x[1] - 2.4).abs() < 1e-4, "{x:?}");
}

#[test]
fn a_restored_optimizer_goes_on_with_the_same_bits() {
    for kind in kinds() {
        for (rows, cols) in [(3, 5), (128, 130)] {
            let step = |optimizer: &mut Optimizer, x: &mut [f32], n: u64| {
                optimizer.step(x, &numbers(n, rows * cols, 0.1), 0.3);
            };
            let mut x = numbers(0, rows * cols, 1.0);
            let mut straight = Optimizer::new(&kind, rows, cols);
            (1..=3).for_each(|n| step(&mut straight, &mut x, n));
            let mut y = x.clone();
            let mut restored =
                Optimizer::restore(&kind, rows, cols, straight.num_steps(), &straight.state()).unwrap();
            (4..=6).for_each(|n| step(&mut straight, &mut x, n));
            (4..=6).for_each(|n| step(&mut restored, &mut y, n));
            assert_eq!(x, y, "{kind:?} at {rows} x {cols}, seed {SEED}");
            assert_eq!(restored.num_steps(), 6);
        }
    }
}

#[test]
fn state_of_another_optimizer_or_shape_is_refused() {
    let restore = |kind: OptimizerKind, rows, from: OptimizerKind| {
        Optimizer::restore(&kind, rows, 4, 1, &Optimizer::new(&from, 2, 4).state()).unwrap_err().to_string()
    };
    let adafactor = OptimizerKind::adafactor(0.0, 0);
    let adamw = OptimizerKind::adamw(0.0);
    assert!(restore(adafactor, 2, adamw).contains("adafactor keeps no tensor \"m\""));
    assert!(restore(adamw, 2, adafactor).contains("adamw needs the tensor \"m\""));
    assert!(restore(adafactor, 3, adafactor).contains("\"v\" has the shape [2, 4] and should have [3, 4]"));
    assert!(restore(OptimizerKind::sgd(0.0, 0.0), 2, adafactor).contains("sgd keeps no tensor \"v\""));
}

#[test]
fn hyperparameters_are_written_and_read_back() {
    for kind in kinds() {
        let json = serde_json::to_string(&kind).unwrap();
        assert!(json.contains(&format!("\"name\":\"{}\"", kind.name())), "{json}");
        assert_eq!(serde_json::from_str::<OptimizerKind>(&json).unwrap(), kind);
    }
    let wrong = r#"{"name":"sgd","momentum":0.0,"weight-decay":0.0,"nesterov":true}"#;
    assert!(serde_json::from_str::<OptimizerKind>(wrong).unwrap_err().to_string().contains("nesterov"));
}
