//! Round trips, special tokens and refusals.

use super::bytes::byte_of_char;
use super::*;
use crate::model::config::tests::tiny;
use crate::model::gguf::tests::{Writer, tiny_gguf};
use crate::model::weights::tests::{Scratch, stories};

fn from_gguf(writer: Writer, config: &LlamaConfig) -> Result<Tokenizer> {
    let bytes = writer.finish();
    let path = Path::new("model.gguf");
    Tokenizer::from_gguf(path, &Gguf::parse(path, &bytes)?, config)
}

/// A SentencePiece vocabulary: specials, 256 bytes, then letters, pairs and words.
fn sentencepiece() -> Writer {
    let mut w = Writer::default();
    w.text("tokenizer.ggml.model", "llama");
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["▁ab", "ab", "▁a", "bc", "a", "b", "c", "▁"].map(str::to_owned));
    let types: Vec<u8> = (0..tokens.len())
        .flat_map(|id| {
            match id {
                0 => 2i32,
                1 | 2 => 3,
                3..259 => 6,
                _ => 1,
            }
            .to_le_bytes()
        })
        .collect();
    let scores: Vec<u8> = (0..tokens.len()).flat_map(|id| (-(id as f32)).to_le_bytes()).collect();
    w.array("tokenizer.ggml.token_type", 5, tokens.len(), &types);
    w.array("tokenizer.ggml.scores", 6, tokens.len(), &scores);
    w.texts("tokenizer.ggml.tokens", &tokens);
    w
}

const TEXTS: [&str; 6] = [
    "def f(x):\n\treturn x ** 10",
    "größe = \"日本\" # 👩‍👩‍👧\r\n",
    "",
    "  \n\n  x",
    "a\u{301}\0é",
    "    if a:\n        b",
];

#[test]
fn byte_level_covers_every_text_and_id_zero() {
    let tokenizer = from_gguf(tiny_gguf(), &tiny()).unwrap();
    for text in TEXTS {
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(ids[0], 0, "the begin token has id 0");
        assert_eq!(ids[1..].len(), text.len());
        assert_eq!(tokenizer.decode(&ids, true), text);
        let bytes: Vec<u8> =
            ids[1..].iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap().to_vec()).collect();
        assert_eq!(bytes, text.as_bytes());
    }
    let spelled = "x<[begin▁of▁sentence]><[MASK_TOKEN]>";
    let ids = tokenizer.encode(spelled, false).unwrap();
    assert_eq!(&ids[1..], [0, 1]);
    assert_eq!(
        (tokenizer.decode(&ids, true), tokenizer.decode(&ids, false)),
        ("x".to_owned(), spelled.to_owned())
    );
    assert_eq!((tokenizer.vocab_size(), tokenizer.token_id("<[MASK_TOKEN]>")), (258, Some(1)));
    assert_eq!(tokenizer.mask_token_id(), Some(5), "the configuration's comes first");
    let unnamed = LlamaConfig { mask_token_id: None, ..tiny() };
    assert_eq!(from_gguf(tiny_gguf(), &unnamed).unwrap().mask_token_id(), Some(1));
    assert_eq!(tokenizer.token_bytes(258), None);
}

#[test]
fn the_alphabet_is_gpt2s() {
    for (byte, c) in
        [(b'a', 'a'), (b' ', 'Ġ'), (b'\n', 'Ċ'), (0, 'Ā'), (0x7F, 'ġ'), (0xAD, 'Ń'), (0xFF, 'ÿ')]
    {
        assert_eq!(byte_of_char(c), Some(byte));
    }
    assert_eq!((byte_of_char(' '), byte_of_char('ń'), byte_of_char('▁')), (None, None, None));
}

#[test]
fn a_stream_never_breaks_a_character() {
    let tokenizer = from_gguf(tiny_gguf(), &tiny()).unwrap();
    for text in TEXTS {
        let mut stream = tokenizer.stream(true);
        let ids = tokenizer.encode(text, true).unwrap();
        let parts: Vec<String> = ids.iter().filter_map(|&id| stream.push(id)).collect();
        assert!(parts.iter().all(|part| !part.contains('\u{FFFD}')), "{parts:?}");
        assert_eq!((parts.concat().as_str(), stream.finish()), (text, None));
    }
    // Bytes that are no UTF-8 come out as the standard library's lossy conversion has them.
    let byte = |b: u8| (0..258).find(|&id| tokenizer.token_bytes(id) == Some(&[b])).unwrap();
    let bytes = [b'a', 0xF0, 0x9F, b'b', 0xFF, 0xE6, 0x97];
    let ids = bytes.map(byte);
    assert_eq!(tokenizer.decode(&ids, true), String::from_utf8_lossy(&bytes));
}

#[test]
fn sentencepiece_merges_by_score_and_falls_back_to_bytes() {
    let tokenizer = from_gguf(sentencepiece(), &tiny()).unwrap();
    let spell = |text: &str| -> Vec<String> {
        let ids = tokenizer.encode(text, true).unwrap();
        ids.iter().map(|&id| tokenizer.id_to_token(id).unwrap()).collect()
    };
    assert_eq!(spell("abc ab"), ["<s>", "▁ab", "c", "▁ab"]);
    assert_eq!(spell("é"), ["<s>", "▁", "<0xC3>", "<0xA9>"]);
    for text in TEXTS.into_iter().chain(["abc  abab", " a"]) {
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&ids, true), text);
    }
    assert_eq!(tokenizer.token_bytes(tokenizer.token_id("▁ab").unwrap()), Some(&b" ab"[..]));
    assert_eq!(tokenizer.token_bytes(tokenizer.token_id("<0xC3>").unwrap()), Some(&[0xC3][..]));
}

#[test]
fn what_does_not_fit_is_refused() {
    let refuse = |writer: Writer, config: &LlamaConfig, part: &str| {
        let error = from_gguf(writer, config).err().expect(part).to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{error}");
    };
    refuse(tiny_gguf(), &LlamaConfig { vocab_size: 257, ..tiny() }, "disagree");
    refuse(Writer::default(), &tiny(), "no tokenizer");
    let mut w = Writer::default();
    w.text("tokenizer.ggml.model", "gpt2");
    w.text("tokenizer.ggml.pre", "poro-chat");
    w.texts("tokenizer.ggml.tokens", &["a".to_owned()]);
    refuse(w, &tiny(), "poro-chat");
    let mut w = Writer::default();
    w.text("tokenizer.ggml.model", "gpt2");
    w.texts("tokenizer.ggml.merges", &[]);
    w.texts("tokenizer.ggml.tokens", &["a".to_owned(), "a".to_owned()]);
    refuse(w, &tiny(), "twice");
}

/// Every name of `tokenizer.ggml.pre` gives llama.cpp's tokens (`golden/generate_splitting.py`).
#[test]
fn text_is_split_as_llama_cpp_splits_it() {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/gguf/splitting.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let texts: Vec<String> = serde_json::from_value(golden["texts"].clone()).unwrap();
    let merges: Vec<String> = serde_json::from_value(golden["merges"].clone()).unwrap();
    let mut tokens: Vec<String> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet()
        .iter()
        .map(char::to_string)
        .collect();
    tokens.sort_unstable();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let config = LlamaConfig { vocab_size: tokens.len(), mask_token_id: None, ..tiny() };
    let mut known = splitting::known_names();
    for rule in golden["rules"].as_array().unwrap() {
        let want: Vec<Vec<u32>> = serde_json::from_value(rule["ids"].clone()).unwrap();
        for name in rule["names"].as_array().unwrap() {
            let mut w = Writer::default();
            w.text("tokenizer.ggml.model", "gpt2");
            if let Some(name) = name.as_str() {
                w.text("tokenizer.ggml.pre", name);
                known.retain(|known| *known != name);
            }
            w.texts("tokenizer.ggml.tokens", &tokens);
            w.texts("tokenizer.ggml.merges", &merges);
            let pair = [("tokenizer.ggml.add_bos_token", 7, [0u8])];
            pair.iter().for_each(|(key, kind, value)| w.pair(key, *kind, value));
            let tokenizer = from_gguf(w, &config).unwrap();
            for (text, want) in texts.iter().zip(&want) {
                // llama.cpp composes nothing; the tokenizers that qwen2 names do.
                let composed = name == "qwen2" && text.contains('\u{301}');
                let got = tokenizer.encode(text, true).unwrap();
                assert!(composed || got == *want, "{name}: {text:?} is {got:?}, not {want:?}");
            }
        }
    }
    assert!(known.is_empty(), "no golden for {known:?}");
}

#[test]
fn a_saved_tokenizer_reads_back_the_same() {
    let scratch = Scratch::new("tokenizer");
    let mut w = tiny_gguf();
    w.text("tokenizer.chat_template", "{{ messages }}");
    let tokenizer = from_gguf(w, &tiny()).unwrap();
    tokenizer.save(&scratch.0).unwrap();
    let again = Tokenizer::from_folder(&scratch.0, &tiny()).unwrap();
    for text in TEXTS {
        assert_eq!(again.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap());
    }
    // The file puts its beginning before conversations, too; in a folder the template has to.
    assert_eq!(again.chat_template(), Some("{{ bos_token }}{{ messages }}"));
    assert_eq!(again.to_json().unwrap(), tokenizer.to_json().unwrap());
    // A cut that the file asks for must not shorten texts; a wrong id of an added token must not
    // pass.
    let text = tokenizer.to_json().unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["truncation"] =
        json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    scratch.write("tokenizer.json", json.to_string());
    let uncut = Tokenizer::from_folder(&scratch.0, &tiny()).unwrap();
    assert_eq!(uncut.encode(TEXTS[0], false).unwrap().len(), TEXTS[0].len());
    json["added_tokens"][0]["id"] = json!(9);
    scratch.write("tokenizer.json", json.to_string());
    let error = Tokenizer::from_folder(&scratch.0, &tiny()).err().unwrap().to_string();
    assert!(error.contains("declares id 9"), "{error}");
}

#[test]
fn stories_round_trip() {
    let Some(dir) = stories() else { return };
    let config = LlamaConfig::read(&dir.join("hf")).unwrap();
    let tokenizer = Tokenizer::for_model(&dir.join("hf"), &config).unwrap();
    let golden: Value =
        serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
    let ids: Vec<u32> = serde_json::from_value(golden["ids"].clone()).unwrap();
    let text = tokenizer.decode(&ids, true);
    assert!(text.starts_with("Once upon a time, there was a little girl"), "{text}");
    // Its tokenizer.json adds nothing, and beside one add_bos_token counts for nothing in transformers 5.
    assert_eq!(tokenizer.encode(&text, true).unwrap(), ids[1..]);
}

/// The table that transformers itself filled in (`tests/golden/generate_ends.py`).
#[test]
fn texts_and_conversations_begin_as_in_transformers() {
    let golden = crate::model::gguf::ends::tests::golden();
    let scratch = Scratch::new("beginnings");
    for case in golden["folder_beginnings"].as_array().unwrap() {
        let mut json = golden["tokenizer"].clone();
        json["post_processor"] = case["post_processor"].clone();
        scratch.write("tokenizer.json", json.to_string());
        scratch.write("tokenizer_config.json", case["tokenizer_config"].to_string());
        let tokenizer = Tokenizer::from_folder(&scratch.0, &tiny()).unwrap();
        let text = tokenizer.encode("def f", true).unwrap();
        assert_eq!(json!(text), case["text"], "{case}");
        let [before, behind] = tokenizer.around().unwrap();
        let bare = tokenizer.encode("def f", false).unwrap();
        assert_eq!([before, bare, behind].concat(), text);
        let chat = tokenizer.chat().unwrap().unwrap();
        let said = chat.render(&[json!({"role": "user", "content": "hi"})], false).unwrap();
        assert_eq!(json!(tokenizer.encode_chat(&said).unwrap()), case["chat"], "{case}");
    }
}

/// llama.cpp puts the token before a conversation too, once: what the template writes counts. A folder made of the file
/// has a template that writes it.
#[test]
fn a_file_that_adds_a_beginning_adds_it_to_conversations_once() {
    let frame = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}";
    for writes in [false, true] {
        let mut w = tiny_gguf();
        let template =
            if writes { format!("{{{{ bos_token }}}}{frame}") } else { frame.to_owned() };
        w.text("tokenizer.chat_template", &template);
        let tokenizer = from_gguf(w, &tiny()).unwrap();
        assert_eq!(tokenizer.chat_bos(), Some(0));
        let scratch = Scratch::new("chat bos");
        tokenizer.save(&scratch.0).unwrap();
        let folder = Tokenizer::from_folder(&scratch.0, &tiny()).unwrap();
        assert_eq!(folder.chat_bos(), None);
        for tokenizer in [tokenizer, folder] {
            let chat = tokenizer.chat().unwrap().unwrap();
            let text = chat.render(&[json!({"role": "user", "content": "hi"})], false).unwrap();
            let ids = tokenizer.encode_chat(&text).unwrap();
            assert_eq!((ids[0], ids.len()), (0, 1 + "user:hi".len()), "{text}");
        }
    }
}
