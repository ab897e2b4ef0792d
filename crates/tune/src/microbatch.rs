//! How much goes through the backbone at once. Only time and memory depend on it: a row's numbers do not depend on the rows
//! beside it, and gradients are summed without regard to order.

use std::ops::Range;

use candle_core::{DType, Device};
use incipit_model::Config;

/// Below this, reading the weights takes longer than the products, and a step gets slower.
pub(crate) const LEAST_TOKENS: usize = 256;

/// What a kind of device does best with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Taste {
    /// Tokens at which wide products run at full speed: with fewer it is better to recompute than to cut smaller.
    pub(crate) comfortable: usize,
    /// More would only need more memory.
    most: usize,
    /// The automatic budget's share of the free memory.
    memory_share: f64,
}

impl Taste {
    /// The rest of the memory is for the operating system's cache of the mapped weights.
    pub(crate) const CPU: Self = Self { comfortable: 2048, most: 2048, memory_share: 0.25 };
    /// The rest of the memory is for what passes by: logits, workspaces, and holes between tensors.
    pub(crate) const GPU: Self = Self { comfortable: 4096, most: 65_536, memory_share: 0.8 };

    pub(crate) fn of(device: &Device) -> Self {
        if device.is_cpu() { Self::CPU } else { Self::GPU }
    }
}

/// Cuts examples of `costs` tokens, in their order, into as few runs as the budget allows, all of about the same size. An
/// example that alone exceeds the budget gets a run of its own.
pub(crate) fn cut(costs: &[usize], budget: usize) -> Vec<Range<usize>> {
    let total: usize = costs.iter().sum();
    let even = total.div_ceil(total.div_ceil(budget).max(1));
    let mut runs = Vec::new();
    let (mut start, mut tokens, mut before) = (0, 0, 0);
    for (i, cost) in costs.iter().enumerate() {
        // The run ends where it is full, or where the examples so far fill the runs so far.
        if i > start && (tokens + cost > budget || before >= even * (runs.len() + 1)) {
            runs.push(start..i);
            (start, tokens) = (i, 0);
        }
        tokens += cost;
        before += cost;
    }
    if start < costs.len() {
        runs.push(start..costs.len());
    }
    runs
}

/// To which of `count` replicas each example goes, so that all have about as many tokens: the longest first, each to the one
/// that has the fewest so far (Graham 1969).
pub(crate) fn deal(costs: &[usize], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..costs.len()).collect();
    places.sort_by_key(|place| std::cmp::Reverse(costs[*place]));
    let (mut tokens, mut replicas) = (vec![0; count], vec![0; costs.len()]);
    for place in places {
        let fewest = (0..count).min_by_key(|replica| tokens[*replica]).unwrap_or_default();
        tokens[fewest] += costs[place];
        replicas[place] = fewest;
    }
    replicas
}

/// Bytes that a training pass keeps for each token of a microbatch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct TokenMemory {
    /// If every layer keeps its inside until the backward pass.
    pub(crate) kept: usize,
    /// If a layer's inside is computed again: one `[T, D]` a layer, and the inside of one.
    pub(crate) recomputed: usize,
}

impl TokenMemory {
    /// An estimate from above: residual stream in f32; queries, keys, values, the attention's output and the
    /// feed-forward's inside in the type of the products. Of `shards` ranks that share a model each has all of the stream, and its
    /// share of the rest.
    pub(crate) fn of(config: &Config, dtype: DType, shards: usize) -> Self {
        let heads = config.num_heads * config.d_kv;
        let feed_forward = config.d_ff * if config.gated { 3 } else { 2 };
        let stream = 4 * config.d_model;
        let cut = |numbers: usize| (dtype.size_in_bytes().max(2) * numbers).div_ceil(shards);
        let inside = 3 * stream + cut(4 * heads + feed_forward);
        // A decoder layer keeps keys and values of the encoder's tokens; or, where targets are short, on a GPU the probabilities, of
        // which each token has one for every head and row of its target. Such rows are d_kv / 4 at most, so that these are an eighth of
        // the former, and no more than they where a single token's are padded to eight. Its own tokens are few.
        let crossed = cut(2 * heads * config.num_decoder_layers);
        let layers = config.num_layers + 1;
        Self { kept: layers * inside + crossed, recomputed: layers * stream + 2 * inside + crossed }
    }
}

/// The tokens of a microbatch and whether layers are recomputed, for what is asked and the memory that is free.
pub(crate) fn plan(
    taste: Taste,
    memory: TokenMemory,
    free_bytes: Option<u64>,
    tokens: Option<usize>,
    recompute: Option<bool>,
) -> (usize, bool) {
    // Where the system does not tell, a small machine is assumed.
    let bytes = free_bytes.unwrap_or(4 << 30) as f64 * taste.memory_share;
    let fitting = |per_token: usize| (bytes / per_token as f64) as usize;
    let recompute = recompute.unwrap_or_else(|| fitting(memory.kept) < tokens.unwrap_or(taste.comfortable));
    let per_token = if recompute { memory.recomputed } else { memory.kept };
    (tokens.unwrap_or_else(|| fitting(per_token).clamp(LEAST_TOKENS, taste.most)), recompute)
}

/// Bytes of memory that a process can still get: the system's estimate, and no more than its control group is allowed.
pub(crate) fn free_memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let available = read("/proc/meminfo").as_deref().and_then(mem_available);
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    let stat = read("/sys/fs/cgroup/memory.stat").unwrap_or_default();
    let used = number("/sys/fs/cgroup/memory.current").unwrap_or(0).saturating_sub(inactive_file(&stat));
    let group = number("/sys/fs/cgroup/memory.max").map(|max| max.saturating_sub(used));
    match (available, group) {
        (Some(system), Some(group)) => Some(system.min(group)),
        (system, group) => system.or(group),
    }
}

/// The line `inactive_file 12345` of a group's statistics: bytes of files that the group has read, which are dropped before a process
/// goes short of memory.
fn inactive_file(stat: &str) -> u64 {
    let line = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
    line.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0)
}

/// The line `MemAvailable: 12345 kB`, in bytes.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_hold_each_example_once_within_the_budget(
            costs in prop::collection::vec(1usize..300, 0..60),
            budget in 1usize..1000,
        ) {
            let runs = cut(&costs, budget);
            prop_assert_eq!(runs.iter().cloned().flatten().collect::<Vec<_>>(), (0..costs.len()).collect::<Vec<_>>());
            for run in runs {
                let tokens: usize = costs[run.clone()].iter().sum();
                prop_assert!(!run.is_empty() && (tokens <= budget || run.len() == 1));
            }
        }
    }

    proptest! {
        #[test]
        fn replicas_have_about_as_many_tokens_each(
            costs in prop::collection::vec(1usize..300, 0..60),
            count in 1usize..9,
        ) {
            let replicas = deal(&costs, count);
            let of = |replica| (0..costs.len()).filter(|i| replicas[*i] == replica).map(|i| costs[i]).sum::<usize>();
            let tokens: Vec<usize> = (0..count).map(of).collect();
            let (most, least) = (tokens.iter().max().unwrap(), tokens.iter().min().unwrap());
            // The fullest had no more than the emptiest before it got its last example.
            prop_assert!(most - least <= costs.iter().copied().max().unwrap_or(0), "{:?}", tokens);
            prop_assert_eq!(tokens.iter().sum::<usize>(), costs.iter().sum::<usize>());
        }
    }

    #[test]
    fn the_benchmark_batch_is_dealt_evenly() {
        let lengths = [
            96, 82, 131, 95, 64, 111, 195, 158, 58, 41, 61, 91, 22, 78, 42, 57, 64, 74, 114, 167, 82, 203,
            60, 110, 154, 94, 57, 51, 68, 102, 48, 79,
        ];
        let costs = lengths.map(|length| length + 104);
        let replicas = deal(&costs, 2);
        let first: usize = (0..32).filter(|i| replicas[*i] == 0).map(|i| costs[i]).sum();
        let all: usize = costs.iter().sum();
        assert!((2 * first).abs_diff(all) * 100 < all, "{first} of {all}");
    }

    #[test]
    fn runs_are_of_about_the_same_size() {
        let runs = cut(&[10; 9], 50);
        assert_eq!(runs, [0..5, 5..9]);
        assert_eq!(cut(&[10; 9], 1000), vec![0..9]);
        assert_eq!(cut(&[70, 10, 10], 50), [0..1, 1..3]);
    }

    #[test]
    fn little_memory_turns_recomputation_on_and_then_shrinks_the_budget() {
        let memory = TokenMemory { kept: 400_000, recomputed: 40_000 };
        let cpu = |free, tokens, recompute| plan(Taste::CPU, memory, Some(free), tokens, recompute);
        assert_eq!(cpu(64 << 30, None, None), (2048, false));
        assert_eq!(cpu(1 << 30, None, None), (2048, true));
        assert_eq!(cpu(100 << 20, None, None), (655, true));
        assert_eq!(cpu(1 << 20, None, None), (256, true));
        assert_eq!(cpu(1 << 20, Some(77), Some(false)), (77, false));
    }

    /// What is left of 80 GB beside the weights of a T5-XXL holds half a batch of 32 long examples whose layers are all kept, which is
    /// faster than the whole batch with every layer computed again.
    #[test]
    fn a_gpu_cuts_a_batch_before_it_recomputes() {
        let xxl = Config::preset("xxl").expect("a known shape");
        let memory = TokenMemory::of(&xxl, DType::BF16, 1);
        let (tokens, recompute) = plan(Taste::GPU, memory, Some(55_000_000_000), None, None);
        assert!((8_000..16_000).contains(&tokens) && !recompute, "{tokens}, {recompute}, {memory:?}");
        // A small card recomputes.
        let (tokens, recompute) = plan(Taste::GPU, memory, Some(6_000_000_000), None, None);
        assert!((4_000..6_000).contains(&tokens) && recompute, "{tokens}, {recompute}");
    }

    /// A T5-XXL has 24 layers on each side, 64 heads of 64 and three products of 10,240 columns; its stream is 4,096 wide.
    #[test]
    fn a_rank_keeps_all_of_the_stream_and_its_share_of_heads_and_columns() {
        let xxl = Config::preset("xxl").expect("a known shape");
        let of = |shards| TokenMemory::of(&xxl, DType::BF16, shards);
        // A layer: 3 * 4 * 4096 of the stream, 2 * (4 * 4096 + 3 * 10240) of heads and columns. All decoder layers: 24 * 2 * 2 * 4096.
        let (stream, cut, crossed) = (49_152, 94_208, 393_216);
        let kept = 25 * (stream + cut) + crossed;
        let recomputed = 25 * 16_384 + 2 * (stream + cut) + crossed;
        assert_eq!((kept, recomputed), (3_977_216, 1_089_536));
        assert_eq!(of(1), TokenMemory { kept, recomputed });
        // 94208 / 8 = 11776, and 393216 / 8 = 49152.
        let kept = 25 * (stream + 11_776) + 49_152;
        let recomputed = 25 * 16_384 + 2 * (stream + 11_776) + 49_152;
        assert_eq!((kept, recomputed), (1_572_352, 580_608));
        assert_eq!(of(8), TokenMemory { kept, recomputed });
    }

    #[test]
    fn a_base_model_needs_kilobytes_a_token_and_layer() {
        let base = Config::preset("base").expect("a known shape");
        let memory = TokenMemory::of(&base, DType::BF16, 1);
        assert!((150_000..800_000).contains(&memory.kept), "{memory:?}");
        assert!(memory.recomputed < memory.kept / 2, "{memory:?}");
    }

    #[test]
    fn the_systems_estimate_is_read() {
        assert_eq!(mem_available("MemTotal: 9 kB\nMemAvailable:   12345 kB\n"), Some(12_641_280));
        assert_eq!(inactive_file("anon 7\ninactive_anon 5\ninactive_file 4096\n"), 4096);
        assert_eq!(inactive_file(""), 0);
        assert_eq!(mem_available("MemTotal: 9 kB\n"), None);
    }
}
