// Reading the marks of `decide`; `words` of 32 bits cover the vocabulary. Needs a binding `marks` of plain words.

fn is_marked(first: u32, id: u32) -> bool {
    return ((marks[first + id / 32u] >> (id % 32u)) & 1u) == 1u;
}

fn is_allowed(how: Lane, words: u32, id: u32) -> bool {
    let first = how.sequence * (STOPS + 2u * words) + STOPS;
    return id != how.hole && (how.forbids == 0u || !is_marked(first, id));
}

// A logit with the penalty on what stands in the text (arXiv 1909.05858).
fn penalised(how: Lane, words: u32, id: u32, logit: f32) -> f32 {
    if how.penalty == 1.0 {
        return logit;
    }
    let first = how.sequence * (STOPS + 2u * words) + STOPS + words;
    let less = select(logit * how.penalty, logit / how.penalty, logit > 0.0);
    return select(logit, max(less, bitcast<f32>(LOWEST)), is_marked(first, id));
}
