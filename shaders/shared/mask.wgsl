// Which query may see which key, told by numbers and never materialised.
// p.mask    0 full, 1 block-causal over positions (causal when p.block is 1), 2 two-copy
// p.block   tokens in a block; p.length: L; p.q_start: position of query token 0 (masks 0 and 1)
// Two-copy tokens are [noisy 0..L, clean L..2L]; a noisy block sees itself and the clean blocks before it, a
// clean block sees the clean blocks up to itself. With HAS_SPANS a token also stays in its document:
// spans[b, position] = (first, end) over positions, both nondecreasing.
// So a query sees two ranges of keys, [x, y) and [z, w), and a key is seen by two ranges of queries; either may be
// empty. Their ends do not decrease within a half, so a tile's ranges run from its first token's to its last's.
override HAS_SPANS: u32 = 0u;
override SHARED: u32 = 1u;   // query heads that share a key head
const TWO_COPY: u32 = 2u;

// What of the range lies in the document of the token at this position.
fn clip(batch: u32, position: u32, range: vec2<u32>) -> vec2<u32> {
    var document = vec2<u32>(0u, p.length);
    if HAS_SPANS == 1u {
        let at = (batch * p.length + position) * 2u;
        document = vec2<u32>(spans[at], spans[at + 1u]);
    }
    let first = max(range.x, document.x);
    return vec2<u32>(first, max(first, min(range.y, document.y)));
}

fn keys_of(batch: u32, query: u32) -> vec4<u32> {
    if p.mask != TWO_COPY {
        let at = query + p.q_start;
        let end = select(p.tk, min(p.tk, (at / p.block + 1u) * p.block), p.mask == 1u);
        return vec4<u32>(clip(batch, at, vec2<u32>(0u, end)), 0u, 0u);
    }
    let is_clean = query >= p.length;
    let at = query - select(0u, p.length, is_clean);
    let begin = at / p.block * p.block;
    let own = vec2<u32>(begin, select(begin + p.block, begin, is_clean));
    let clean = vec2<u32>(0u, select(begin, begin + p.block, is_clean));
    return vec4<u32>(clip(batch, at, own), clip(batch, at, clean) + p.length);
}

fn queries_of(batch: u32, key: u32) -> vec4<u32> {
    if p.mask != TWO_COPY {
        let begin = select(0u, key / p.block * p.block, p.mask == 1u);
        let seen = clip(batch, key, vec2<u32>(max(begin, p.q_start), p.q_start + p.tq)) - p.q_start;
        return vec4<u32>(seen, 0u, 0u);
    }
    let is_clean = key >= p.length;
    let at = key - select(0u, p.length, is_clean);
    let begin = at / p.block * p.block;
    if !is_clean {
        return vec4<u32>(clip(batch, at, vec2<u32>(begin, begin + p.block)), 0u, 0u);
    }
    let noisy = clip(batch, at, vec2<u32>(begin + p.block, p.length));
    return vec4<u32>(noisy, clip(batch, at, vec2<u32>(begin, p.length)) + p.length);
}

// Rows of tile number `tile` of `size` rows, of which a token has `heads`: (first row, one past the last). A tile
// lies in one half.
fn tile_rows(tile: u32, size: u32, tokens: u32, heads: u32) -> vec2<u32> {
    let half_rows = select(tokens, p.length, p.mask == TWO_COPY) * heads;
    let tiles = (half_rows + size - 1u) / size;
    let first = tile % tiles * size;
    return vec2<u32>(first, min(first + size, half_rows)) + tile / tiles * half_rows;
}

// Where query rows of these numbers are: a token's heads that share a key head are rows side by side, so that they
// share what is loaded of the keys.
fn query_at(batch: u32, kv_head: u32, row: vec4<u32>) -> vec4<u32> {
    return ((batch * p.tq + row / SHARED) * p.kv_heads + kv_head) * SHARED + row % SHARED;
}

// The same for key rows.
fn key_at(batch: u32, kv_head: u32, row: vec4<u32>) -> vec4<u32> {
    return (batch * p.capacity + row) * p.kv_heads + kv_head;
}
