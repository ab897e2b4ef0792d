//! The tokenizer of a T5: `tokenizer.json`, or SentencePiece's own file.

use std::collections::HashSet;
use std::path::Path;

use prost::Message;
use serde::Deserialize;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, PreTokenizerWrapper, Tokenizer};

use crate::error::{Error, Result, io};
use crate::spiece::{ModelProto, ModelType, Piece, PieceType};

/// The files of a tokenizer, as Hugging Face names them.
pub(crate) const FILES: &[&str] = &[
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
];

const EOS: &str = "</s>";
/// SentencePiece's mark for a space.
const SPACE_MARK: char = '\u{2581}';

pub(crate) fn is_present(dir: &Path) -> bool {
    FILES[..2].iter().any(|name| dir.join(name).is_file())
}

/// The tokenizer in `dir`: from `tokenizer.json`, else from `spiece.model`, with the pipeline and the ids that transformers
/// gives a T5. Encoding with special tokens ends with `</s>`; nothing is truncated or padded.
///
/// `<extra_id_0>` to `<extra_id_99>` follow the pieces of `spiece.model`, the highest first; their number is `extra_ids` of
/// `tokenizer_config.json` where that file says one. If the model was trained with byte fallback, a character outside the
/// vocabulary becomes its bytes, as in SentencePiece (transformers makes it unknown).
///
/// # Errors
/// If neither file is there, one cannot be read, or it is not the tokenizer of a T5.
pub fn load_tokenizer(dir: &Path) -> Result<Tokenizer> {
    let [json, spiece] = [dir.join(FILES[0]), dir.join(FILES[1])];
    if json.is_file() {
        return from_json(&json);
    }
    if spiece.is_file() {
        let bytes = std::fs::read(&spiece).map_err(io("read", &spiece))?;
        let num_extra_ids = num_extra_ids(&dir.join("tokenizer_config.json"))?;
        return from_spiece(&bytes, num_extra_ids).map_err(|detail| refused(&spiece, detail));
    }
    Err(Error::NoTokenizer(dir.to_owned()))
}

fn refused(file: &Path, detail: String) -> Error {
    Error::Tokenizer { file: file.to_owned(), detail }
}

fn from_json(path: &Path) -> Result<Tokenizer> {
    let bytes = std::fs::read(path).map_err(io("read", path))?;
    let unreadable =
        |error| format!("it cannot be parsed ({error}); take the tokenizer.json of the model itself");
    let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| refused(path, unreadable(error)))?;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| refused(path, error.to_string()))?;
    let encoded = tokenizer.encode("a", true).map_err(|error| refused(path, error.to_string()))?;
    if tokenizer.token_to_id(EOS).is_none_or(|eos| encoded.get_ids().last() != Some(&eos)) {
        let detail = format!(
            "a text that it encodes does not end with {EOS}; take the tokenizer.json of the model itself"
        );
        return Err(refused(path, detail));
    }
    Ok(tokenizer)
}

#[derive(Deserialize)]
struct TokenizerConfig {
    extra_ids: Option<usize>,
}

fn num_extra_ids(config: &Path) -> Result<usize> {
    const USUAL: usize = 100;
    if !config.is_file() {
        return Ok(USUAL);
    }
    let text = std::fs::read_to_string(config).map_err(io("read", config))?;
    let config: TokenizerConfig = serde_json::from_str(&text)
        .map_err(|error| refused(config, format!("it cannot be parsed ({error})")))?;
    Ok(config.extra_ids.unwrap_or(USUAL))
}

fn from_spiece(bytes: &[u8], num_extra_ids: usize) -> std::result::Result<Tokenizer, String> {
    let proto = ModelProto::decode(bytes)
        .map_err(|error| format!("it is not a SentencePiece model ({error}); download it again"))?;
    if proto.pieces.is_empty() {
        return Err("it has no vocabulary; download it again".to_owned());
    }
    let spec = proto.trainer_spec.clone().unwrap_or_default();
    if spec.model_type() != ModelType::Unigram {
        return Err(format!("it is a {:?} model where T5 has a unigram one", spec.model_type()));
    }
    let unk_id = usize::try_from(spec.unk_id()).unwrap_or(usize::MAX);
    if proto.pieces.get(unk_id).is_none_or(|piece| piece.kind() != PieceType::Unknown) {
        return Err(format!("its piece {} is not the unknown one", spec.unk_id()));
    }
    let eos = proto.pieces.iter().position(|piece| piece.piece() == EOS);
    let eos =
        eos.and_then(|id| u32::try_from(id).ok()).ok_or_else(|| format!("its vocabulary has no {EOS}"))?;

    let extra_ids = extra_ids(&proto.pieces, num_extra_ids);
    let mut vocab: Vec<(String, f64)> =
        proto.pieces.iter().map(|p| (p.piece().to_owned(), f64::from(p.score()))).collect();
    vocab.extend(extra_ids.iter().map(|name| (name.clone(), 0.0)));
    let text = |error: tokenizers::Error| error.to_string();
    let model = Unigram::from(vocab, Some(unk_id), spec.byte_fallback()).map_err(text)?;

    let mut tokenizer = Tokenizer::new(model);
    if let Some(map) =
        proto.normalizer_spec.as_ref().map(|spec| spec.precompiled_charsmap()).filter(|map| !map.is_empty())
    {
        let normalizer =
            Precompiled::from(map).map_err(|error| format!("its character map is broken ({error})"))?;
        tokenizer.with_normalizer(Some(normalizer)).map_err(text)?;
    }
    add_pipeline(&mut tokenizer, spec.byte_fallback(), eos)?;
    add_tokens(&mut tokenizer, &proto.pieces, extra_ids)?;
    Ok(tokenizer)
}

/// The sentinels that are not pieces already, highest first: `<extra_id_0>` has the last id.
fn extra_ids(pieces: &[Piece], count: usize) -> Vec<String> {
    let known: HashSet<&str> = pieces.iter().map(Piece::piece).collect();
    let names = (0..count).rev().map(|n| format!("<extra_id_{n}>"));
    names.filter(|name| !known.contains(name.as_str())).collect()
}

fn add_pipeline(tokenizer: &mut Tokenizer, byte_fallback: bool, eos: u32) -> std::result::Result<(), String> {
    let metaspace = || Metaspace::new(SPACE_MARK, PrependScheme::Always, true);
    let split: [PreTokenizerWrapper; 2] = [WhitespaceSplit.into(), metaspace().into()];
    tokenizer.with_pre_tokenizer(Some(Sequence::new(split.into())));
    let spaces: DecoderWrapper = metaspace().into();
    tokenizer.with_decoder(Some(if byte_fallback {
        DecoderSequence::new(vec![ByteFallback::default().into(), spaces]).into()
    } else {
        spaces
    }));
    let template = TemplateProcessing::builder()
        .try_single(format!("$A {EOS}"))
        .and_then(|builder| builder.try_pair(format!("$A {EOS} $B:0 {EOS}:0")))?
        .special_tokens(vec![(EOS, eos)])
        .build()
        .map_err(|error| error.to_string())?;
    tokenizer.with_post_processor(Some(template));
    Ok(())
}

/// The tokens that are found in a text before it is cut: literally, and as a whole.
fn add_tokens(
    tokenizer: &mut Tokenizer,
    pieces: &[Piece],
    extra_ids: Vec<String>,
) -> std::result::Result<(), String> {
    let of = |kinds: &'static [PieceType]| {
        pieces.iter().filter(|piece| kinds.contains(&piece.kind())).map(|piece| piece.piece().to_owned())
    };
    let special = of(&[PieceType::Unknown, PieceType::Control]).chain(extra_ids);
    tokenizer
        .add_special_tokens(special.map(|token| AddedToken::from(token, true)))
        .map_err(|error| error.to_string())?;
    let user_defined = of(&[PieceType::UserDefined]);
    tokenizer
        .add_tokens(user_defined.map(|token| AddedToken::from(token, false).normalized(false)))
        .map_err(|error| error.to_string())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spiece::TrainerSpec;

    fn piece(text: &str, score: f32, kind: PieceType) -> Piece {
        Piece { piece: Some(text.to_owned()), score: Some(score), kind: Some(kind as i32) }
    }

    fn proto(more: Vec<Piece>, spec: TrainerSpec) -> Vec<u8> {
        let mut pieces = vec![
            piece("<pad>", 0.0, PieceType::Control),
            piece(EOS, 0.0, PieceType::Control),
            piece("<unk>", 0.0, PieceType::Unknown),
            piece("\u{2581}a", -1.0, PieceType::Normal),
            piece("\u{2581}", -2.0, PieceType::Normal),
        ];
        pieces.extend(more);
        ModelProto { pieces, trainer_spec: Some(spec), normalizer_spec: None }.encode_to_vec()
    }

    fn unk(id: i32) -> TrainerSpec {
        TrainerSpec { unk_id: Some(id), ..TrainerSpec::default() }
    }

    fn ids(bytes: &[u8], text: &str) -> Vec<u32> {
        let tokenizer = from_spiece(bytes, 2).expect("a model");
        tokenizer.encode(text, true).expect("a text").get_ids().to_vec()
    }

    #[test]
    fn an_unknown_character_is_unknown() {
        assert_eq!(ids(&proto(Vec::new(), unk(2)), "a é"), [3, 4, 2, 1]);
    }

    #[test]
    fn with_byte_fallback_an_unknown_character_becomes_its_bytes() {
        let bytes =
            (0..=255).map(|byte: u8| piece(&format!("<0x{byte:02X}>"), 0.0, PieceType::Byte)).collect();
        let spec = TrainerSpec { byte_fallback: Some(true), ..unk(2) };
        let proto = proto(bytes, spec);
        assert_eq!(ids(&proto, "a é"), [3, 4, 5 + 0xc3, 5 + 0xa9, 1]);
        let tokenizer = from_spiece(&proto, 2).expect("a model");
        assert_eq!(tokenizer.decode(&ids(&proto, "a é"), true).expect("ids of the model"), "a é");
    }

    #[test]
    fn a_user_defined_piece_is_found_whole_and_kept_when_decoding() {
        let proto = proto(vec![piece("<sep>", 0.0, PieceType::UserDefined)], unk(2));
        assert_eq!(ids(&proto, "a<sep>a"), [3, 5, 3, 1]);
        let tokenizer = from_spiece(&proto, 2).expect("a model");
        assert_eq!(tokenizer.decode(&[3, 5, 1], true).expect("ids of the model"), "a<sep>");
    }

    #[test]
    fn a_sentinel_that_is_a_piece_keeps_its_id() {
        let proto = proto(vec![piece("<extra_id_0>", 0.0, PieceType::UserDefined)], unk(2));
        assert_eq!(ids(&proto, "<extra_id_0><extra_id_1>"), [5, 6, 1]);
    }

    #[test]
    fn models_that_are_not_t5_are_refused() {
        let refusal = |bytes: &[u8]| from_spiece(bytes, 100).expect_err("another model");
        let bpe = TrainerSpec { model_type: Some(ModelType::Bpe as i32), ..unk(2) };
        assert!(refusal(&proto(Vec::new(), bpe)).contains("a Bpe model where T5 has a unigram one"));
        for id in [0, 9, -1] {
            assert!(refusal(&proto(Vec::new(), unk(id))).contains("is not the unknown one"), "{id}");
        }
        let headless = ModelProto {
            pieces: vec![piece("<unk>", 0.0, PieceType::Unknown)],
            trainer_spec: Some(unk(0)),
            normalizer_spec: None,
        };
        assert!(refusal(&headless.encode_to_vec()).contains("has no </s>"));
    }
}
