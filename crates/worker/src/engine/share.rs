//! Weighted fair shares of a backbone's time (stride scheduling, Waldspurger and Weihl 1995).
//!
//! Every tenant has a virtual time that goes on with each token that it is served, the slower the greater its weight. The one that is
//! behind all others is next. What is served together in one turn is what would have been served one after the other.

use std::collections::BTreeMap;

/// Names a tenant.
pub(crate) type Key = u64;

/// Virtual time of a token at weight 1.
const TOKEN: u128 = 1 << 20;

/// Who had how much.
#[derive(Debug, Default)]
pub(crate) struct FairShare {
    tenants: BTreeMap<Key, Tenant>,
    /// Virtual time of the one that was served last: where a new one begins.
    now: u128,
}

#[derive(Debug)]
struct Tenant {
    time: u128,
    weight: u32,
}

/// What a tenant wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    /// Tokens that go through the backbone for it.
    pub(crate) tokens: u64,
    /// Whether it can be served together with others.
    pub(crate) shared: bool,
}

impl FairShare {
    /// A tenant more. It is owed nothing for the time before.
    pub(crate) fn add(&mut self, key: Key, weight: u32) {
        self.tenants.insert(key, Tenant { time: self.now, weight: weight.max(1) });
    }

    /// A tenant less.
    pub(crate) fn remove(&mut self, key: Key) {
        self.tenants.remove(&key);
    }

    /// Another weight from now on.
    pub(crate) fn set_weight(&mut self, key: Key, weight: u32) {
        if let Some(tenant) = self.tenants.get_mut(&key) {
            tenant.weight = weight.max(1);
        }
    }

    /// Whose turn it is: the one that is most behind, and with it those that would follow, up to `budget` tokens. All are charged.
    /// Whatever wants nothing now is left out, and is owed nothing for it.
    pub(crate) fn turn(&mut self, budget: u64, want: impl Fn(Key) -> Option<Want>) -> Vec<Key> {
        let mut turn = Vec::new();
        let mut tokens = 0;
        while let Some((key, wanted)) = self.next(&want) {
            let first = turn.is_empty();
            let fits = wanted.shared && tokens + wanted.tokens <= budget && !turn.contains(&key);
            if !first && !fits {
                break;
            }
            self.charge(key, wanted.tokens);
            turn.push(key);
            tokens += wanted.tokens;
            if !wanted.shared {
                break;
            }
        }
        turn
    }

    fn next(&self, want: &impl Fn(Key) -> Option<Want>) -> Option<(Key, Want)> {
        let wanting = self.tenants.iter().filter_map(|(key, tenant)| Some((tenant.time, *key, want(*key)?)));
        wanting.min_by_key(|(time, key, _)| (*time, *key)).map(|(_, key, want)| (key, want))
    }

    fn charge(&mut self, key: Key, tokens: u64) {
        let Some(tenant) = self.tenants.get_mut(&key) else { return };
        // One that wanted nothing for a while goes on from now, and does not make up for it.
        self.now = self.now.max(tenant.time);
        tenant.time = self.now.max(tenant.time) + u128::from(tokens) * TOKEN / u128::from(tenant.weight);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Serves `turns` turns and counts everybody's tokens.
    fn served(weights: &[u32], costs: &[u64], budget: u64, turns: usize) -> Vec<u64> {
        let mut share = FairShare::default();
        weights.iter().enumerate().for_each(|(key, weight)| share.add(key as Key, *weight));
        let mut tokens = vec![0; weights.len()];
        for _ in 0..turns {
            for key in share.turn(budget, |key| Some(Want { tokens: costs[key as usize], shared: true })) {
                tokens[key as usize] += costs[key as usize];
            }
        }
        tokens
    }

    #[test]
    fn small_jobs_share_a_turn_and_a_large_one_has_it_alone() {
        let mut share = FairShare::default();
        (0..3).for_each(|key| share.add(key, 10));
        let costs = [100, 100, 5000];
        let mut turn = || share.turn(1000, |key| Some(Want { tokens: costs[key as usize], shared: true }));
        assert_eq!(turn(), [0, 1]);
        assert_eq!(turn(), [2]);
        assert_eq!(turn(), [0, 1]);
    }

    #[test]
    fn what_cannot_be_shared_has_a_turn_of_its_own() {
        let mut share = FairShare::default();
        (0..3).for_each(|key| share.add(key, 1));
        let want = |key| Some(Want { tokens: 10, shared: key != 1 });
        assert_eq!(share.turn(1000, want), [0]);
        assert_eq!(share.turn(1000, want), [1]);
        assert_eq!(share.turn(1000, want), [2, 0]);
    }

    #[test]
    fn nobody_saves_up_turns_that_it_did_not_want() {
        let mut share = FairShare::default();
        (0..2).for_each(|key| share.add(key, 1));
        let want = |tokens| Some(Want { tokens, shared: true });
        for _ in 0..100 {
            assert_eq!(share.turn(10, |key| if key == 0 { want(10) } else { None }), [0]);
        }
        let turns: Vec<Key> = (0..10).flat_map(|_| share.turn(10, |_| want(10))).collect();
        assert!(turns.iter().filter(|key| **key == 1).count() <= 6, "{turns:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn shares_follow_the_weights_and_nobody_starves(
            tenants in prop::collection::vec((1u32..=100, 50u64..=500), 1..=32),
            budget in 1u64..=2000,
        ) {
            let (weights, costs): (Vec<u32>, Vec<u64>) = tenants.into_iter().unzip();
            let turns = 3_000;
            let tokens = served(&weights, &costs, budget, turns);
            let all: u64 = tokens.iter().sum();
            let weight: u32 = weights.iter().sum();
            for (served, own) in tokens.iter().zip(&weights) {
                let due = all as f64 * f64::from(*own) / f64::from(weight);
                // Off by a batch of its own and one of another.
                prop_assert!((*served as f64 - due).abs() <= 1000.0, "{served} {due}");
            }
        }
    }
}
