//! What a mesh refuses, and how to mend it.

/// Why a mesh, or a part of a tensor, cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A degree is 0.
    #[error("--{flag} is 0; the least is 1")]
    NoRanks {
        /// The flag, without its dashes.
        flag: &'static str,
    },
    /// The degrees do not multiply to the number of ranks.
    #[error(
        "--tp {tp} times --dp {dp} makes {}, and {world} {}; start {0} of them, or change --tp or --dp",
        product(*tp, *dp),
        if *world == 1 { "rank was started" } else { "ranks were started" }
    )]
    World {
        /// The tensor-parallel degree.
        tp: usize,
        /// The data-parallel degree.
        dp: usize,
        /// The ranks that there are.
        world: usize,
    },
    /// A part that is not among the parts.
    #[error("part {index} of {count} is none; parts count from 0")]
    NoSuchPart {
        /// The part.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// A size that cannot be cut into equal parts.
    #[error("{what} of size {size} cannot be cut into {count} equal parts; pass a --tp of {}", choices(*size))]
    Uneven {
        /// What is cut, such as "attention heads".
        what: &'static str,
        /// How many there are of it.
        size: usize,
        /// Into how many parts it was to be cut.
        count: usize,
    },
}

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn product(tp: usize, dp: usize) -> String {
    tp.checked_mul(dp).map_or_else(|| "more ranks than can be counted".to_owned(), |ranks| ranks.to_string())
}

/// The degrees up to 64 that divide `size`, as a person would list them.
fn choices(size: usize) -> String {
    let fitting: Vec<_> =
        (1..=64).filter(|count| size.is_multiple_of(*count)).map(|c: usize| c.to_string()).collect();
    match fitting.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => "1".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::choices;

    #[test]
    fn degrees_that_would_do_are_listed() {
        assert_eq!(choices(12), "1, 2, 3, 4, 6 or 12");
        assert_eq!(choices(1), "1");
        assert_eq!(choices(67), "1");
    }
}
