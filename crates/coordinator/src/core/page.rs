//! Lists, a page at a time (AIP-158).

use incipit_proto::Problem;

const DEFAULT_SIZE: usize = 50;
const MAX_SIZE: usize = 1000;

/// A part of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Asks for the next part; empty on the last.
    pub next_page_token: String,
}

/// The items behind `token`, as many as `size` says. Items come with keys, by which they are sorted here; `scope` names the list and its
/// filters, and a token of one is refused for another.
///
/// # Errors
/// If the size is negative, or the token is not one of this list.
pub fn paginate<T>(
    scope: &str,
    size: i32,
    token: &str,
    items: impl Iterator<Item = (String, T)>,
) -> Result<Page<T>, Problem> {
    let size = match usize::try_from(size) {
        Ok(0) => DEFAULT_SIZE,
        Ok(size) => size.min(MAX_SIZE),
        Err(_) => return Err(Problem::field("page_size", format!("is {size}; give 0 to {MAX_SIZE}"))),
    };
    let after = match token {
        "" => None,
        token => Some(key_of(scope, token).ok_or_else(|| {
            Problem::field("page_token", "is not one that this list has given; ask again without it")
        })?),
    };
    let beyond = |key: &String| after.as_ref().is_none_or(|after| key > after);
    let mut items: Vec<(String, T)> = items.filter(|(key, _)| beyond(key)).collect();
    items.sort_by(|a, b| a.0.cmp(&b.0));
    let more = items.len() > size;
    items.truncate(size);
    let last = items.last().filter(|_| more);
    let next_page_token = last.map(|(key, _)| token_of(scope, key)).unwrap_or_default();
    Ok(Page { items: items.into_iter().map(|(_, item)| item).collect(), next_page_token })
}

/// A key that puts the greatest number first.
#[must_use]
pub fn newest_first(number: u64) -> String {
    format!("{:020}", u64::MAX - number)
}

fn token_of(scope: &str, key: &str) -> String {
    let sum = blake3::hash(format!("{scope}\n{key}").as_bytes()).to_hex();
    let hex: String = key.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("{}{hex}", &sum[..16])
}

fn key_of(scope: &str, token: &str) -> Option<String> {
    let hex = token.get(16..)?;
    if !hex.is_ascii() || hex.len() % 2 != 0 {
        return None;
    }
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).ok();
    let bytes: Option<Vec<u8>> = (0..hex.len()).step_by(2).map(byte).collect();
    let key = String::from_utf8(bytes?).ok()?;
    (token_of(scope, &key) == token).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: u64) -> impl Iterator<Item = (String, u64)> {
        (0..n).map(|number| (newest_first(number), number))
    }

    #[test]
    fn pages_together_are_the_list_the_newest_first() {
        let (mut all, mut token) = (Vec::new(), String::new());
        loop {
            let page = paginate("jobs", 7, &token, numbers(40)).unwrap();
            all.extend(page.items);
            token = page.next_page_token;
            if token.is_empty() {
                break;
            }
        }
        assert_eq!(all, (0..40).rev().collect::<Vec<_>>());
    }

    #[test]
    fn sizes_are_50_if_none_is_asked_for_and_1000_at_most_and_not_negative() {
        assert_eq!(paginate("jobs", 0, "", numbers(60)).unwrap().items.len(), 50);
        assert_eq!(paginate("jobs", i32::MAX, "", numbers(2000)).unwrap().items.len(), 1000);
        assert_eq!(paginate("jobs", -1, "", numbers(1)).unwrap_err().fields[0].0, "page_size");
    }

    #[test]
    fn a_token_of_another_list_or_of_nobody_is_refused() {
        let token = paginate("jobs", 1, "", numbers(3)).unwrap().next_page_token;
        assert!(paginate("jobs", 1, &token, numbers(3)).is_ok());
        for (scope, token) in [
            ("jobs?backbone=b", &*token),
            ("jobs", "x"),
            ("jobs", "0123456789abcdefé"),
            ("jobs", &token[1..]),
        ] {
            let problem = paginate(scope, 1, token, numbers(3)).unwrap_err();
            assert_eq!(problem.fields[0].0, "page_token", "{token}");
        }
    }
}
