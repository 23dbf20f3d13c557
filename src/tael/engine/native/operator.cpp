#include "operator.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace tael {

namespace {

constexpr int64_t kTaskBytes = 48 * 1024;   // of weights a task, where few rows make memory the limit
constexpr int64_t kRowBlock = 96;           // rows a task, where there are many

float* grow(std::vector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

inline void fetch(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
}

// How attention is done in one of its forms: units of queries, widths, and where queries, keys, values and results are.
// key, value(head, start of the slot's entry, slot, buffer) -> fp32 values; ahead(head, start)
// asks for an entry's memory.
template <class Query, class Key, class Value, class Ahead, class Out>
struct Form {
  const std::vector<Unit>* units;
  int64_t layer, dk, dv, first_key;
  Query query;
  Key key;
  Value value;
  Ahead ahead;
  Out out;
};

}  // namespace

template <class F>
void Operator::each_row(int64_t rows, const F& f) {
  if (rows <= 2) {
    for (int64_t i = 0; i < rows; ++i) f(i);
    return;
  }
  const int64_t some = std::max<int64_t>(1, rows / (4 * pool_.threads()));
  pool_.run((rows + some - 1) / some, [&](int64_t task, int) {
    for (int64_t i = task * some; i < std::min(rows, (task + 1) * some); ++i) f(i);
  });
}

void Operator::prepare(Rows& rows, const float* x, int64_t count, int64_t width, bool round) {
  rows.set(x, count, width, round);
  if (round) each_row(count, [&](int64_t i) { rows.round_row(i); });
}

void Operator::multiply_all(const Job* jobs, size_t number) {
  tasks_.clear();
  for (size_t j = 0; j < number; ++j) {
    const Job& job = jobs[j];
    const int64_t count = job.count < 0 ? job.rows->count : job.count;
    const int64_t units_end = job.to < 0 ? job.matrix->units() : job.to;
    if (count == 0) continue;
    int64_t units = std::max<int64_t>(1, kTaskBytes / job.matrix->unit_bytes());
    if (count > 4) units = std::max<int64_t>(1, std::min(units, (job.matrix->units() + 7) / 8));
    for (int64_t row = 0; row < count; row += kRowBlock)
      for (int64_t unit = job.from; unit < units_end; unit += units)
        tasks_.push_back({&job, row, std::min(count, row + kRowBlock), unit, std::min(units_end, unit + units)});
  }
  pool_.run(static_cast<int64_t>(tasks_.size()), [&](int64_t i, int) {
    const Task& t = tasks_[i];
    multiply(*t.job->matrix, *t.job->rows, t.job->index, t.first, t.last, t.from, t.to, t.job->y, t.job->stride);
  });
}

uint8_t* Operator::entry(int64_t layer, const Batch& batch, int64_t sequence, int64_t slot) const {
  const int64_t block = batch.tables[sequence * batch.table_width + (slot >> block_bits_)];
  const int64_t within = slot & ((int64_t{1} << block_bits_) - 1), first = (layer * blocks_ + block) << block_bits_;
  const int64_t step = shape_.mla ? shape_.width() : shape_.head_dim;
  return static_cast<uint8_t*>(cache_) + (first * shape_.width() + within * step) * bytes_of(cache_type_);
}

// Queries of `unit` that share keys: those of head group `group`. Calls f(token, head, row) for each.
template <class F>
void Operator::each_query(const Unit& unit, int64_t group, const F& f) const {
  const int64_t per = unit.heads / unit.groups;
  for (int64_t token = unit.first; token < unit.last; ++token)
    for (int64_t h = group * per; h < (group + 1) * per; ++h)
      f(token, unit.head + h, (token - unit.first) * unit.heads + h);
}

// One chunk of keys for a head group of several units that hold it in the same blocks: what they see of it is read once.
// emit(member, row of the member's unit, index) is called for every query; parts[index], values[index] are its result.
template <class Form, class Emit>
void Operator::attend_together(const Batch& batch, const Form& form, const Member* members, int64_t count,
                               int64_t chunk, int64_t group, AttentionScratch& scratch, const Emit& emit) {
  const float* q[kMostRows];
  float* values[kMostRows];
  int64_t limit[kMostRows], rows = 0, last = 0;
  Partial parts[kMostRows];
  scratch.values.resize(kMostRows * form.dv);
  for (int64_t m = 0; m < count; ++m) {
    const Unit& unit = (*form.units)[members[m].unit];
    last = std::max(last, batch.positions[unit.last - 1] + 1);
    each_query(unit, group, [&](int64_t token, int64_t head, int64_t) {
      q[rows] = form.query(token, head);
      limit[rows] = batch.positions[token] + 1;
      values[rows] = scratch.values.data() + rows * form.dv;
      ++rows;
    });
  }
  const Unit& unit = (*form.units)[members[0].unit];
  const int64_t from = std::max(form.first_key, chunk * kChunk);
  const int64_t to = std::max(from, std::min((chunk + 1) * kChunk, last));
  const uint8_t* base[kChunk];
  for (int64_t slot = from; slot < to; ++slot) base[slot - from] = entry(form.layer, batch, unit.sequence, slot);
  const int64_t head = unit.head + group * (unit.heads / unit.groups);
  attend_chunk(
      rows, q, limit, from, to, form.dk, form.dv, shape_.scale,
      [&](int64_t k, float* buffer) { return form.key(head, base[k], from + k, buffer); },
      [&](int64_t k, float* buffer) { return form.value(head, base[k], from + k, buffer); },
      [&](int64_t k) { form.ahead(head, base[k]); },
      parts, values, scratch);
  int64_t index = 0;
  for (int64_t m = 0; m < count; ++m)
    each_query((*form.units)[members[m].unit], group,
               [&](int64_t, int64_t, int64_t row) { emit(members[m], row, parts[index], values[index]), ++index; });
}

// Many units: each is one task that takes its chunks in order. Few: chunks are tasks of their own, those that several
// sequences share are taken by all of them at once, and a second pass merges each row's chunks, in the same order.
template <class Form>
void Operator::attend(const Batch& batch, const Form& form) {
  const std::vector<Unit>& units = *form.units;
  auto chunks_of = [&](const Unit& unit) { return batch.positions[unit.last - 1] / kChunk + 1; };
  auto finish = [&](const Unit& unit, int64_t row, const Partial& part, const float* sums) {
    float* to = form.out(unit.first + row / unit.heads, unit.head + row % unit.heads);
    const float inverse = part.sum > 0 ? 1.0f / part.sum : 0.0f;
    for (int64_t i = 0; i < form.dv; ++i) to[i] = sums[i] * inverse;
  };
  const bool several = batch.count > batch.sequences;  // prompts are read
  if (several && static_cast<int64_t>(units.size()) >= 4 * pool_.threads()) {
    pool_.run(static_cast<int64_t>(units.size()), [&](int64_t u, int thread) {
      const Unit& unit = units[u];
      AttentionScratch& scratch = scratch_[thread];
      scratch.sums.resize(kMostRows * form.dv);
      const Member self{u, 0};
      for (int64_t group = 0; group < unit.groups; ++group) {
        Partial parts[kMostRows];
        for (int64_t chunk = 0; chunk < chunks_of(unit); ++chunk) {
          int64_t at = 0;
          attend_together(batch, form, &self, 1, chunk, group, scratch,
                          [&](const Member&, int64_t, const Partial& part, const float* values) {
                            merge(parts[at], scratch.sums.data() + at * form.dv, part, values, form.dv), ++at;
                          });
        }
        int64_t at = 0;
        each_query(unit, group, [&](int64_t, int64_t, int64_t row) {
          finish(unit, row, parts[at], scratch.sums.data() + at * form.dv), ++at;
        });
      }
    });
    return;
  }
  begin_.resize(units.size());
  int64_t total = 0;
  for (size_t u = 0; u < units.size(); ++u) {
    begin_[u] = total;
    total += chunks_of(units[u]) * (units[u].last - units[u].first) * units[u].heads;
  }
  if (static_cast<int64_t>(partials_.size()) < total) partials_.resize(total);
  float* values = grow(partial_values_, total * form.dv);
  share_chunks(batch, units);
  pool_.run(static_cast<int64_t>(pieces_.size()), [&](int64_t i, int thread) {
    const Piece& piece = pieces_[i];
    for (int64_t group = 0; group < units[members_[piece.first].unit].groups; ++group)
      attend_together(batch, form, members_.data() + piece.first, piece.count, piece.chunk, group, scratch_[thread],
                      [&](const Member& member, int64_t row, const Partial& part, const float* from) {
                        partials_[member.at + row] = part;
                        std::memcpy(values + (member.at + row) * form.dv, from, form.dv * sizeof(float));
                      });
  });
  each_row(static_cast<int64_t>(units.size()), [&](int64_t u) {
    const Unit& unit = units[u];
    const int64_t rows = (unit.last - unit.first) * unit.heads, chunks = chunks_of(unit);
    for (int64_t r = 0; r < rows; ++r) {
      Partial part = partials_[begin_[u] + r];
      float* sums = values + (begin_[u] + r) * form.dv;
      for (int64_t c = 1; c < chunks; ++c) {
        const int64_t at = begin_[u] + c * rows + r;
        merge(part, sums, partials_[at], values + at * form.dv, form.dv);
      }
      finish(unit, r, part, sums);
    }
  });
}

// pieces_ and members_: every unit's chunks, those that lie in the same blocks put together while their rows fit.
void Operator::share_chunks(const Batch& batch, const std::vector<Unit>& units) {
  std::vector<Found>& all = found_chunks_;
  all.clear(), pieces_.clear(), by_blocks_.clear();
  const int64_t blocks = std::max<int64_t>(1, kChunk >> block_bits_);
  auto block_of = [&](const Unit& unit, int64_t chunk) {
    return batch.tables + unit.sequence * batch.table_width + ((chunk * kChunk) >> block_bits_);
  };
  std::vector<int64_t>& rows_in = piece_rows_;
  rows_in.clear();
  for (size_t u = 0; u < units.size(); ++u) {
    const Unit& unit = units[u];
    const int64_t end = batch.positions[unit.last - 1] + 1, rows = (unit.last - unit.first) * unit.heads;
    for (int64_t chunk = 0; chunk * kChunk < end; ++chunk) {
      int64_t piece = -1;
      const int64_t mine = rows / unit.groups;
      const bool whole = batch.sequences > 1 && end >= (chunk + 1) * kChunk;
      if (whole) {
        const auto key = std::make_pair(block_of(unit, chunk)[0], chunk * 4096 + unit.head);
        const auto known = by_blocks_.find(key);
        if (known != by_blocks_.end()) {
          const Found& other = all[known->second];
          if (rows_in[other.piece] + mine <= kMostRows &&
              std::equal(block_of(unit, chunk), block_of(unit, chunk) + blocks, block_of(units[other.unit], chunk)))
            piece = other.piece;
        }
        if (piece < 0) by_blocks_[key] = static_cast<int64_t>(all.size());
      }
      if (piece < 0) {
        piece = static_cast<int64_t>(pieces_.size());
        pieces_.push_back({chunk, 0, 0}), rows_in.push_back(0);
      }
      rows_in[piece] += mine, ++pieces_[piece].count;
      all.push_back({static_cast<int64_t>(u), chunk, begin_[u] + chunk * rows, piece});
    }
  }
  int64_t first = 0;
  for (Piece& piece : pieces_) piece.first = first, first += std::exchange(piece.count, 0);
  members_.resize(all.size());
  for (const Found& found : all) {
    Piece& piece = pieces_[found.piece];
    members_[piece.first + piece.count++] = {found.unit, found.at};
  }
}

void Operator::find_sequences(const Batch& batch) {
  sequence_.resize(batch.count);
  for (int64_t m = 0; m < batch.sequences; ++m)
    for (int64_t i = batch.starts[m]; i < batch.starts[m + 1]; ++i) sequence_[i] = m;
}

void Operator::attention(const Layer& layer, int64_t index, const Batch& batch, int64_t first_key) {
  const Shape& s = shape_;
  const int64_t n = batch.count, d = s.head_dim, kv = s.kv_heads * d, per = s.heads / s.kv_heads;
  float* q = grow(q_, n * s.heads * d);
  float* k = grow(k_, n * kv);
  float* v = grow(v_, n * kv);
  multiply_all({{layer.q.get(), &in_, q, s.heads * d}, {layer.k.get(), &in_, k, kv}, {layer.v.get(), &in_, v, kv}});
  const std::vector<int64_t>& sequence = sequence_;
  // A block holds, for one key head after the other, the keys of its slots and then their values: each a stretch that
  // the processor reads ahead by itself.
  const int64_t size = bytes_of(cache_type_), plane = (d * size) << block_bits_;
  each_row(n, [&](int64_t i) {
    const float *cos = cos_ + batch.positions[i] * s.pairs(), *sin = sin_ + batch.positions[i] * s.pairs();
    for (int64_t h = 0; h < s.heads; ++h) rotate(q + (i * s.heads + h) * d, cos, sin, s.pairs(), s.interleaved);
    for (int64_t h = 0; h < s.kv_heads; ++h) rotate(k + i * kv + h * d, cos, sin, s.pairs(), s.interleaved);
    uint8_t* to = entry(index, batch, sequence[i], batch.positions[i]);
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      from_float(cache_type_, k + i * kv + h * d, to + 2 * h * plane, d);
      from_float(cache_type_, v + i * kv + h * d, to + (2 * h + 1) * plane, d);
    }
  });
  const int64_t tokens = std::max<int64_t>(1, 24 / per);
  units_.clear();
  for (int64_t m = 0; m < batch.sequences; ++m)
    for (int64_t i = batch.starts[m]; i < batch.starts[m + 1]; i += tokens)
      units_.push_back({m, 0, s.heads, s.kv_heads, i, std::min(batch.starts[m + 1], i + tokens)});
  float* out = grow(attended_, n * s.heads * d);
  auto read = [&](const uint8_t* from, float* buffer) -> const float* {
    if (cache_type_ == Type::f32) return reinterpret_cast<const float*>(from);
    to_float(cache_type_, from, buffer, d);
    return buffer;
  };
  attend(batch, Form{&units_, index, d, d, first_key,
                     [=](int64_t i, int64_t h) -> const float* { return q + (i * s.heads + h) * d; },
                     [=](int64_t h, const uint8_t* base, int64_t, float* buffer) {
                       return read(base + 2 * (h / per) * plane, buffer);
                     },
                     [=](int64_t h, const uint8_t* base, int64_t, float* buffer) {
                       return read(base + (2 * (h / per) + 1) * plane, buffer);
                     },
                     [=](int64_t h, const uint8_t* base) {
                       fetch(base + 2 * (h / per) * plane, d * size);
                       fetch(base + (2 * (h / per) + 1) * plane, d * size);
                     },
                     [=](int64_t i, int64_t h) { return out + (i * s.heads + h) * d; }});
  prepare(mid_, out, n, s.heads * d, layer.o->rounds_activations());
}

void Operator::attention_mla(const Layer& layer, int64_t index, const Batch& batch, int64_t first_key) {
  const Shape& s = shape_;
  const int64_t n = batch.count, head = s.nope + s.rope, width = s.width(), size = bytes_of(cache_type_);
  float* q = grow(q_, n * s.heads * head);
  float* kv = grow(entry_, n * width);
  if (layer.q_a) {
    const int64_t low = layer.q_a->out;
    float* q_low = grow(q_low_, n * low);
    multiply_all({{layer.q_a.get(), &in_, q_low, low}, {layer.kv_a.get(), &in_, kv, width}});
    each_row(n, [&](int64_t i) { rms_norm(q_low + i * low, layer.q_norm, s.latent_eps, low, q_low + i * low); });
    prepare(mid_, q_low, n, low, layer.q->rounds_activations());
    multiply_all({{layer.q.get(), &mid_, q, s.heads * head}});
  } else {
    multiply_all({{layer.q.get(), &in_, q, s.heads * head}, {layer.kv_a.get(), &in_, kv, width}});
  }
  const std::vector<int64_t>& sequence = sequence_;
  each_row(n, [&](int64_t i) {
    const float *cos = cos_ + batch.positions[i] * s.pairs(), *sin = sin_ + batch.positions[i] * s.pairs();
    for (int64_t h = 0; h < s.heads; ++h)
      rotate(q + (i * s.heads + h) * head + s.nope, cos, sin, s.pairs(), s.interleaved);
    float* e = kv + i * width;
    rotate(e + s.rank, cos, sin, s.pairs(), s.interleaved);
    rms_norm(e, layer.kv_norm, s.latent_eps, s.rank, e);
    from_float(cache_type_, e, entry(index, batch, sequence[i], batch.positions[i]), width);
  });
  float* out = grow(attended_, n * s.heads * s.value);
  std::vector<Unit> absorbed;
  std::vector<int64_t> tokens;
  const int64_t some = std::min<int64_t>(s.heads, 16);
  for (int64_t m = 0; m < batch.sequences; ++m) {
    if (batch.expanded[m]) continue;
    for (int64_t i = batch.starts[m]; i < batch.starts[m + 1]; ++i) {
      tokens.push_back(i);
      for (int64_t h = 0; h < s.heads; h += some) absorbed.push_back({m, h, std::min(some, s.heads - h), 1, i, i + 1});
    }
  }
  if (!tokens.empty()) {
    // MQA form: queries taken through W_UK [R + P], all heads on the cached values, results through W_UV.
    const int64_t rows = static_cast<int64_t>(tokens.size());
    float* q_latent = grow(q_latent_, n * s.heads * width);
    pool_.run(rows * s.heads, [&](int64_t task, int) {
      const int64_t i = tokens[task / s.heads], h = task % s.heads;
      const float* from = q + (i * s.heads + h) * head;
      float* to = q_latent + (i * s.heads + h) * width;
      const Type type = static_cast<Type>(static_cast<int>(layer.key_up->kind));
      const auto* up = static_cast<const uint8_t*>(layer.key_up->data);
      // kv_b itself serves where it is no packed matrix: its heads are V rows further apart.
      const int64_t apart = layer.key_up == layer.kv_b ? s.nope + s.value : s.nope;
      const int64_t row_bytes = s.rank * bytes_of(type);
      auto lift = [&](auto tag) {
        constexpr Type T = decltype(tag)::value;
        for (int64_t r = 0; r < s.rank; r += 32) {
          const int64_t c = std::min<int64_t>(4, (s.rank - r) / 8);
          __m256 acc[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
          for (int64_t j = 0; j < s.nope; ++j) {
            const __m256 weight = _mm256_broadcast_ss(from + j);
            const uint8_t* row = up + (h * apart + j) * row_bytes;
            for (int64_t b = 0; b < c; ++b) acc[b] = _mm256_fmadd_ps(weight, load8<T>(row, r + 8 * b), acc[b]);
          }
          for (int64_t b = 0; b < c; ++b) _mm256_storeu_ps(to + r + 8 * b, acc[b]);
        }
      };
      if (type == Type::f32)
        lift(std::integral_constant<Type, Type::f32>{});
      else if (type == Type::f16)
        lift(std::integral_constant<Type, Type::f16>{});
      else
        lift(std::integral_constant<Type, Type::bf16>{});
      std::memcpy(to + s.rank, from + s.nope, s.rope * sizeof(float));
    });
    float* latent = grow(out_, n * s.heads * s.rank);
    auto read = [&](const uint8_t* from, int64_t values, float* buffer) -> const float* {
      if (cache_type_ == Type::f32) return reinterpret_cast<const float*>(from);
      to_float(cache_type_, from, buffer, values);
      return buffer;
    };
    attend(batch, Form{&absorbed, index, width, s.rank, first_key,
                       [=](int64_t i, int64_t h) -> const float* { return q_latent + (i * s.heads + h) * width; },
                       [=](int64_t, const uint8_t* base, int64_t, float* buffer) { return read(base, width, buffer); },
                       [=](int64_t, const uint8_t* base, int64_t, float* buffer) { return read(base, s.rank, buffer); },
                       [=](int64_t, const uint8_t* base) { fetch(base, width * size); },
                       [=](int64_t i, int64_t h) { return latent + (i * s.heads + h) * s.rank; }});
    prepare(latent_rows_, latent, n * s.heads, s.rank, false);
    if (layer.kv_b->rounds_activations()) {
      latent_rows_.set(latent, n * s.heads, s.rank, true);
      each_row(rows * s.heads, [&](int64_t r) { latent_rows_.round_row(tokens[r / s.heads] * s.heads + r % s.heads); });
    }
    // W_UV of head h: the last V of its rows in kv_b. Row i of the product is token tokens[i].
    std::vector<int32_t> lines(rows * s.heads);
    std::vector<Job> jobs;
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t r = 0; r < rows; ++r) lines[h * rows + r] = static_cast<int32_t>(tokens[r] * s.heads + h);
    float* flat = grow(k_, rows * s.heads * s.value);
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t first = h * (s.nope + s.value) + s.nope;
      jobs.push_back({layer.kv_b.get(), &latent_rows_, flat + h * rows * s.value - first, s.value,
                      lines.data() + h * rows, rows, first / kPanel, (first + s.value) / kPanel});
    }
    multiply_all(jobs);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t h = 0; h < s.heads; ++h)
        std::memcpy(out + (tokens[r] * s.heads + h) * s.value, flat + (h * rows + r) * s.value,
                    s.value * sizeof(float));
  }
  for (int64_t m = 0; m < batch.sequences; ++m) {
    if (!batch.expanded[m] || batch.starts[m] == batch.starts[m + 1]) continue;
    // MHA form: the latents of all that this sequence holds are expanded to keys and values once.
    const int64_t keys = batch.positions[batch.starts[m + 1] - 1] + 1, wide = s.heads * (s.nope + s.value);
    float* latents = grow(latents_, keys * width);
    each_row(keys, [&](int64_t slot) {
      to_float(cache_type_, entry(index, batch, m, slot), latents + slot * width, width);
    });
    float* narrow = grow(out_, keys * s.rank);
    each_row(keys, [&](int64_t slot) {
      std::memcpy(narrow + slot * s.rank, latents + slot * width, s.rank * sizeof(float));
    });
    prepare(latent_rows_, narrow, keys, s.rank, layer.kv_b->rounds_activations());
    float* expanded = grow(expanded_, keys * wide);
    multiply_all({{layer.kv_b.get(), &latent_rows_, expanded, wide}});
    std::vector<Unit> units;
    for (int64_t i = batch.starts[m]; i < batch.starts[m + 1]; i += 32)
      for (int64_t h = 0; h < s.heads; ++h) units.push_back({m, h, 1, 1, i, std::min(batch.starts[m + 1], i + 32)});
    attend(batch, Form{&units, index, head, s.value, first_key,
                       [=](int64_t i, int64_t h) -> const float* { return q + (i * s.heads + h) * head; },
                       [=](int64_t h, const uint8_t*, int64_t slot, float* buffer) -> const float* {
                         const float* from = expanded + slot * wide + h * (s.nope + s.value);
                         std::memcpy(buffer, from, s.nope * sizeof(float));
                         std::memcpy(buffer + s.nope, latents + slot * width + s.rank, s.rope * sizeof(float));
                         return buffer;
                       },
                       [=](int64_t h, const uint8_t*, int64_t slot, float*) -> const float* {
                         return expanded + slot * wide + h * (s.nope + s.value) + s.nope;
                       },
                       [](int64_t, const uint8_t*) {},
                       [=](int64_t i, int64_t h) { return out + (i * s.heads + h) * s.value; }});
  }
  prepare(mid_, out, n, s.heads * s.value, layer.o->rounds_activations());
}

// V3 section 2.1.2: choose by biased scores in the best groups, weigh by unbiased ones (tael/model/moe.py).
void Operator::route(const Layer& layer, int64_t row) {
  const Shape& s = shape_;
  float* scores = scores_.data() + row * s.experts;
  if (s.sigmoid) {
    for (int64_t e = 0; e < s.experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
  } else {
    const float top = *std::max_element(scores, scores + s.experts);
    float sum = 0;
    for (int64_t e = 0; e < s.experts; ++e) sum += scores[e] = std::exp(scores[e] - top);
    for (int64_t e = 0; e < s.experts; ++e) scores[e] /= sum;
  }
  std::vector<float> biased(scores, scores + s.experts);
  if (layer.router_bias)
    for (int64_t e = 0; e < s.experts; ++e) biased[e] += layer.router_bias[e];
  if (s.limits_groups) {
    const int64_t size = s.experts / s.groups;
    std::vector<std::pair<float, int64_t>> strength(s.groups);
    for (int64_t g = 0; g < s.groups; ++g) {
      std::vector<float> part(biased.begin() + g * size, biased.begin() + (g + 1) * size);
      const int64_t best = std::min(s.group_top, size);
      std::partial_sort(part.begin(), part.begin() + best, part.end(), std::greater<float>());
      strength[g] = {-std::accumulate(part.begin(), part.begin() + best, 0.0f), g};
    }
    std::sort(strength.begin(), strength.end());
    for (int64_t g = s.kept_groups; g < s.groups; ++g)
      std::fill_n(biased.begin() + strength[g].second * size, size, -std::numeric_limits<float>::infinity());
  }
  int32_t* choice = choice_.data() + row * s.chosen;
  float* gates = gates_.data() + row * s.chosen;
  float sum = 0;
  for (int64_t j = 0; j < s.chosen; ++j) {
    const auto best = std::max_element(biased.begin(), biased.end()) - biased.begin();
    choice[j] = static_cast<int32_t>(best);
    gates[j] = scores[best];
    sum += gates[j];
    biased[best] = -std::numeric_limits<float>::infinity();
  }
  const float factor = s.normalises ? s.routed_scale / (sum + 1e-20f) : s.routed_scale;
  for (int64_t j = 0; j < s.chosen; ++j) gates[j] *= factor;
}

// Reads in_ (the normalised input), adds to out_ [count, hidden].
void Operator::feed_forward(const Layer& layer, int64_t count) {
  const int64_t wide = layer.gate->out;
  float* gate = grow(gate_, count * wide);
  float* up = grow(up_, count * wide);
  multiply_all({{layer.gate.get(), &in_, gate, wide}, {layer.up.get(), &in_, up, wide}});
  each_row(count, [&](int64_t i) { swiglu(gate + i * wide, up + i * wide, wide); });
  prepare(mid_, gate, count, wide, layer.down->rounds_activations());
  multiply_all({{layer.down.get(), &mid_, out_.data(), shape_.hidden}});
}

void Operator::mixture(const Layer& layer, int64_t count) {
  const Shape& s = shape_;
  const int64_t wide = layer.experts[0][0]->out, pairs = count * s.chosen;
  const int64_t shared = layer.gate ? layer.gate->out : 0;
  if (static_cast<int64_t>(choice_.size()) < pairs) choice_.resize(pairs);
  grow(gates_, pairs);
  multiply_all({{layer.router.get(), &in_, grow(scores_, count * s.experts), s.experts}});
  each_row(count, [&](int64_t i) { route(layer, i); });
  // Pairs (token, place) by expert; each expert reads its tokens' rows where they lie.
  order_.resize(pairs);
  std::vector<int32_t> begin(s.experts + 1, 0), token(pairs), self(pairs);
  for (int64_t p = 0; p < pairs; ++p) ++begin[choice_[p] + 1];
  for (int64_t e = 0; e < s.experts; ++e) begin[e + 1] += begin[e];
  std::vector<int32_t> next(begin.begin(), begin.end() - 1);
  for (int64_t p = 0; p < pairs; ++p) {
    const int32_t at = next[choice_[p]]++;
    order_[p] = at;
    token[at] = static_cast<int32_t>(p / s.chosen);
  }
  std::iota(self.begin(), self.end(), 0);
  float* gate = grow(gate_, pairs * wide + count * shared);
  float* up = grow(up_, pairs * wide + count * shared);
  float *gate_shared = gate + pairs * wide, *up_shared = up + pairs * wide;
  std::vector<Job> jobs;
  for (int64_t e = 0; e < s.experts; ++e) {
    const int64_t first = begin[e], some = begin[e + 1] - first;
    if (!some) continue;
    jobs.push_back({layer.experts[e][0].get(), &in_, gate + first * wide, wide, token.data() + first, some});
    jobs.push_back({layer.experts[e][1].get(), &in_, up + first * wide, wide, token.data() + first, some});
  }
  if (shared) {
    jobs.push_back({layer.gate.get(), &in_, gate_shared, shared});
    jobs.push_back({layer.up.get(), &in_, up_shared, shared});
  }
  multiply_all(jobs);
  each_row(pairs, [&](int64_t p) { swiglu(gate + p * wide, up + p * wide, wide); });
  if (shared) each_row(count, [&](int64_t i) { swiglu(gate_shared + i * shared, up_shared + i * shared, shared); });
  prepare(mid_, gate, pairs, wide, layer.experts[0][2]->rounds_activations());
  if (shared) prepare(out_rows_, gate_shared, count, shared, layer.down->rounds_activations());
  float* routed = grow(joined_, pairs * s.hidden);
  jobs.clear();
  for (int64_t e = 0; e < s.experts; ++e) {
    const int64_t first = begin[e], some = begin[e + 1] - first;
    if (some)
      jobs.push_back(
          {layer.experts[e][2].get(), &mid_, routed + first * s.hidden, s.hidden, self.data() + first, some});
  }
  if (shared) jobs.push_back({layer.down.get(), &out_rows_, out_.data(), s.hidden});
  multiply_all(jobs);
  each_row(count, [&](int64_t i) {
    float* to = out_.data() + i * s.hidden;
    if (!shared) std::fill_n(to, s.hidden, 0.0f);
    for (int64_t j = 0; j < s.chosen; ++j)
      add_scaled(to, routed + order_[i * s.chosen + j] * s.hidden, gates_[i * s.chosen + j], s.hidden);
  });
}

void Operator::run_layer(const Layer& layer, int64_t index, const Batch& batch, float* x, int64_t first_key) {
  const int64_t n = batch.count, d = shape_.hidden;
  float* normed = grow(normed_, n * d);
  const Matrix& first = shape_.mla ? *layer.kv_a : *layer.q;
  auto norm_and_round = [&](const float* weight, bool round) {
    in_.set(normed, n, d, round);
    each_row(n, [&](int64_t i) {
      rms_norm(x + i * d, weight, shape_.eps, d, normed + i * d);
      if (round) in_.round_row(i);
    });
  };
  norm_and_round(layer.input_norm, first.rounds_activations() || (shape_.mla && layer.q->rounds_activations()));
  if (shape_.mla)
    attention_mla(layer, index, batch, first_key);
  else
    attention(layer, index, batch, first_key);
  float* out = grow(out_, n * d);
  multiply_all({{layer.o.get(), &mid_, out, d}});
  each_row(n, [&](int64_t i) { add(x + i * d, out + i * d, d); });
  const bool moe = !layer.experts.empty();
  const Matrix& gate = moe ? *layer.experts[0][0] : *layer.gate;
  norm_and_round(layer.post_norm, gate.rounds_activations() || (layer.gate && layer.gate->rounds_activations()));
  if (moe)
    mixture(layer, n);
  else
    feed_forward(layer, n);
  each_row(n, [&](int64_t i) { add(x + i * d, out_.data() + i * d, d); });
}

void Operator::forward(const Batch& batch, float* hidden) {
  const int64_t n = batch.count, d = shape_.hidden;
  pool_.begin();
  find_sequences(batch);
  float* x = grow(x_, n * d);
  each_row(n, [&](int64_t i) { read_row(*embedding_, batch.tokens[i], x + i * d); });
  const int64_t main = static_cast<int64_t>(layers_.size() - drafts_.size());
  for (int64_t i = 0; i < main; ++i) run_layer(layers_[i], i, batch, x, 0);
  each_row(n, [&](int64_t i) { rms_norm(x + i * d, norm_, shape_.eps, d, hidden + i * d); });
  pool_.end();
}

void Operator::logits(const float* hidden, int64_t rows, float* out) {
  pool_.begin();
  prepare(hidden_rows_, hidden, rows, shape_.hidden, head_->rounds_activations());
  multiply_all({{head_.get(), &hidden_rows_, out, head_->out}});
  pool_.end();
}

void Operator::draft(int64_t module, const Batch& batch, const float* states, float* hidden) {
  const DraftModule& m = drafts_[module];
  const int64_t n = batch.count, d = shape_.hidden;
  pool_.begin();
  find_sequences(batch);
  float* joined = grow(joined_, n * 2 * d);
  float* x = grow(x_, n * d);
  each_row(n, [&](int64_t i) {
    read_row(*embedding_, batch.tokens[i], joined + i * 2 * d);
    rms_norm(joined + i * 2 * d, m.embedding_norm, shape_.eps, d, joined + i * 2 * d);
    rms_norm(states + i * d, m.hidden_norm, shape_.eps, d, joined + i * 2 * d + d);
  });
  prepare(hidden_rows_, joined, n, 2 * d, m.join->rounds_activations());
  multiply_all({{m.join.get(), &hidden_rows_, x, d}});
  // Slot t + k holds what state t and the token k further gave: the first k slots have nothing.
  run_layer(layers_[m.layer], m.layer, batch, x, module + 1);
  each_row(n, [&](int64_t i) { rms_norm(x + i * d, m.norm, shape_.eps, d, hidden + i * d); });
  pool_.end();
}

}  // namespace tael
