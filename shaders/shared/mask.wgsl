// Which query may see which key, told by numbers and never materialised.
// p.mask    0 full, 1 block-causal (causal when p.block is 1), 2 two-copy
// p.block   tokens in a block; p.length: L
// Two-copy tokens are [noisy 0..L, clean L..2L]; a noisy block sees itself and the clean blocks before it, a
// clean block sees the clean blocks up to itself.
// SPANS 1   a token also stays in its document: spans[b, position] = (first, end) over positions, both nondecreasing
// SPANS 2   the rows continue sequences that share a cache; b is one of these, p.mask is 0, and spans[b] tells of the
//           sequence: its first row, its rows, the first one's position, tokens in a block (0 sees all of its own), the
//           slot of its first token, how many tokens lie there, the slot of the others; and one number unused. Keys go
//           by position, so that sums have one order wherever the tokens lie.
// So a query sees two ranges of keys, [x, y) and [z, w), and a key is seen by two ranges of queries; either may be
// empty. Their ends do not decrease within a half, so a tile's ranges run from its first token's to its last's.
override SPANS: u32 = 0u;
override SHARED: u32 = 1u;   // query heads that share a key head
const TWO_COPY: u32 = 2u;
const DOCUMENTS: u32 = 1u;
const SEQUENCES: u32 = 2u;

// What of the range lies in the document of the token at this position.
fn clip(batch: u32, position: u32, range: vec2<u32>) -> vec2<u32> {
    var document = vec2<u32>(0u, p.length);
    if SPANS == DOCUMENTS {
        let at = (batch * p.length + position) * 2u;
        document = vec2<u32>(spans[at], spans[at + 1u]);
    }
    let first = max(range.x, document.x);
    return vec2<u32>(first, max(first, min(range.y, document.y)));
}

fn keys_of(batch: u32, query: u32) -> vec4<u32> {
    if SPANS == SEQUENCES {
        let at = batch * 8u;
        let block = spans[at + 3u];
        var end = spans[at + 2u] + spans[at + 1u];
        if block > 0u {
            end = min(end, ((spans[at + 2u] + query) / block + 1u) * block);
        }
        return vec4<u32>(0u, end, 0u, 0u);
    }
    if p.mask != TWO_COPY {
        let end = select(p.tk, min(p.tk, (query / p.block + 1u) * p.block), p.mask == 1u);
        return vec4<u32>(clip(batch, query, vec2<u32>(0u, end)), 0u, 0u);
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
        return vec4<u32>(clip(batch, key, vec2<u32>(begin, p.tq)), 0u, 0u);
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
// lies in one half. The last tiles of a sequence may be empty.
fn tile_rows(batch: u32, tile: u32, size: u32, tokens: u32, heads: u32) -> vec2<u32> {
    var half_rows = select(tokens, p.length, p.mask == TWO_COPY) * heads;
    var half = tile / ((half_rows + size - 1u) / size);
    var first = tile % ((half_rows + size - 1u) / size) * size;
    if SPANS == SEQUENCES {
        half_rows = spans[batch * 8u + 1u] * heads;
        half = 0u;
        first = tile * size;
    }
    return vec2<u32>(first, min(first + size, half_rows)) + half * half_rows;
}

// Where query rows of these numbers are: a token's heads that share a key head are rows side by side, so that they
// share what is loaded of the keys.
fn query_at(batch: u32, kv_head: u32, row: vec4<u32>) -> vec4<u32> {
    var token = batch * p.tq;
    if SPANS == SEQUENCES {
        token = spans[batch * 8u];
    }
    return ((token + row / SHARED) * p.kv_heads + kv_head) * SHARED + row % SHARED;
}

// The same for key rows.
fn key_at(batch: u32, kv_head: u32, row: vec4<u32>) -> vec4<u32> {
    if SPANS == SEQUENCES {
        let at = batch * 8u;
        let shared_tokens = vec4<u32>(spans[at + 5u]);
        let slot = select(spans[at + 6u] + row - shared_tokens, spans[at + 4u] + row, row < shared_tokens);
        return slot * p.kv_heads + kv_head;
    }
    return (batch * p.tk + row) * p.kv_heads + kv_head;
}
