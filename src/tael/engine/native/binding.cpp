// What Python sees of the operator. Tensors are kept alive by the objects that point into them.
#include <torch/extension.h>

#include <sys/mman.h>

#include <mutex>

#include "bandwidth.h"
#include "operator.h"

namespace py = pybind11;
using namespace tael;

namespace {

struct HeldMatrix : Matrix {
  at::Tensor data_tensor, bias_tensor;
};

void need(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

const float* floats(const at::Tensor& t) {
  need(t.is_contiguous() && t.scalar_type() == at::kFloat && t.is_cpu(), "expected a contiguous fp32 tensor on the CPU");
  return t.data_ptr<float>();
}

const int64_t* whole_numbers(const at::Tensor& t) {
  need(t.is_contiguous() && t.scalar_type() == at::kLong && t.is_cpu(), "expected a contiguous int64 tensor on the CPU");
  return t.data_ptr<int64_t>();
}

// Packed weights lie one after another in pages of 2 MB where the system has them: a core then draws 18 GB/s from memory
// where it drew 13 (measured). A chunk is freed with the last tensor in it.
at::Tensor allocate(int64_t bytes) {
  struct Chunk {
    uint8_t* data = nullptr;
    int64_t size = 0, used = 0;
    explicit Chunk(int64_t n) : size(n) {
      data = static_cast<uint8_t*>(std::aligned_alloc(1 << 21, n));
      if (!data) throw std::bad_alloc();
      madvise(data, n, MADV_HUGEPAGE);
    }
    ~Chunk() { std::free(data); }
  };
  constexpr int64_t page = 1 << 21, usual = 16 * page;
  static std::mutex mutex;
  static std::weak_ptr<Chunk> last;
  std::lock_guard<std::mutex> lock(mutex);
  const int64_t aligned = (bytes + 63) / 64 * 64;
  auto chunk = last.lock();
  if (!chunk || chunk->used + aligned > chunk->size) {
    chunk = std::make_shared<Chunk>(std::max(usual, (aligned + page - 1) / page * page));
    last = chunk;
  }
  uint8_t* at = chunk->data + chunk->used;
  chunk->used += aligned;
  return at::from_blob(at, {bytes}, [chunk](void*) {}, at::kByte);
}

void set_bias(HeldMatrix& m, const std::optional<at::Tensor>& bias) {
  if (!bias) return;
  m.bias_tensor = *bias;
  m.bias = floats(*bias);
  need(bias->numel() == m.out, "the bias has another length than the outputs");
}

// Row-major fp32, fp16 or bf16 [out, in]; read where it lies, so that changes in place are seen.
std::shared_ptr<HeldMatrix> float_matrix(const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  auto m = std::make_shared<HeldMatrix>();
  need(weight.dim() == 2 && weight.is_contiguous() && weight.is_cpu(), "expected a contiguous matrix on the CPU");
  need(weight.size(1) % 8 == 0, "the number of inputs must be a multiple of 8");
  const auto type = weight.scalar_type();
  need(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, "expected fp32, fp16 or bf16");
  m->kind = type == at::kFloat ? Kind::f32 : type == at::kHalf ? Kind::f16 : Kind::bf16;
  m->out = weight.size(0), m->in = weight.size(1);
  m->data_tensor = weight;
  m->data = weight.data_ptr();
  set_bias(*m, bias);
  return m;
}

Kind kind_of(const std::string& scheme) {
  if (scheme == "int4") return Kind::int4;
  if (scheme == "int8") return Kind::int8;
  need(scheme == "w8a8", "the scheme must be int4, int8 or w8a8");
  return Kind::w8a8;
}

std::shared_ptr<HeldMatrix> shaped(const std::string& scheme, int64_t out, int64_t in, bool minimums) {
  auto m = std::make_shared<HeldMatrix>();
  need(in % kGroup == 0, "the number of inputs must be a multiple of 32");
  m->kind = kind_of(scheme), m->out = out, m->in = in, m->minimums = minimums;
  return m;
}

int64_t packed_bytes(const std::string& scheme, int64_t out, int64_t in, bool minimums) {
  auto m = shaped(scheme, out, in, minimums);
  return m->units() * m->unit_bytes();
}

at::Tensor pack_matrix(const std::string& scheme, const at::Tensor& codes, const at::Tensor& scales,
                       const std::optional<at::Tensor>& minimums) {
  const bool four = scheme == "int4";
  need(codes.dim() == 2 && codes.is_contiguous() && scales.is_contiguous(), "expected contiguous codes and scales");
  need(codes.scalar_type() == (four ? at::kByte : at::kChar), "int4 codes are uint8, others int8");
  need(scales.scalar_type() == at::kHalf && scales.size(0) == codes.size(0), "expected fp16 scales, a row an output");
  const int64_t in = codes.size(1) * (four ? 2 : 1);
  auto m = shaped(scheme, codes.size(0), in, minimums.has_value());
  need(in % scales.size(1) == 0 && in / scales.size(1) % kGroup == 0, "groups must be multiples of 32 inputs");
  if (minimums)
    need(minimums->is_contiguous() && minimums->sizes() == scales.sizes() && minimums->scalar_type() == at::kHalf,
         "expected fp16 minimums of the scales' shape");
  auto packed = allocate(m->units() * m->unit_bytes());
  const auto* from = static_cast<const uint8_t*>(codes.data_ptr());
  const auto* factors = static_cast<const uint16_t*>(scales.data_ptr());
  const auto* lows = minimums ? static_cast<const uint16_t*>(minimums->data_ptr()) : nullptr;
  auto* to = packed.data_ptr<uint8_t>();
  py::gil_scoped_release release;
  const int64_t units = m->units(), parts = std::min<int64_t>(units, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (int64_t part = 0; part < parts; ++part)
    threads.emplace_back([&, part] {
      for (int64_t u = units * part / parts; u < units * (part + 1) / parts; ++u)
        pack(*m, from, factors, lows, in / scales.size(1), u, to + u * m->unit_bytes());
    });
  for (auto& thread : threads) thread.join();
  return packed;
}

std::shared_ptr<HeldMatrix> packed_matrix(const std::string& scheme, const at::Tensor& packed, int64_t out, int64_t in,
                                          bool minimums, const std::optional<at::Tensor>& bias) {
  auto m = shaped(scheme, out, in, minimums);
  need(packed.is_contiguous() && packed.scalar_type() == at::kByte && packed.is_cpu(), "expected packed bytes");
  need(packed.numel() == m->units() * m->unit_bytes(), "the packed bytes do not belong to this shape");
  m->data_tensor = packed;
  m->data = packed.data_ptr();
  set_bias(*m, bias);
  return m;
}

// The operator with what it points to.
struct Model {
  Operator op;
  std::vector<at::Tensor> kept;
  at::Tensor cache, cos, sin;

  Model(Shape shape, int threads) : op(shape, threads) {}

  const float* keep(const at::Tensor& t) {
    kept.push_back(t);
    return floats(t);
  }

  Batch batch(const at::Tensor& tokens, const at::Tensor& positions, const at::Tensor& starts, const at::Tensor& tables,
              const at::Tensor& expanded) {
    need(expanded.scalar_type() == at::kBool && expanded.is_contiguous(), "expected a contiguous bool tensor");
    need(op.cache_ && op.cos_, "set_cache and set_rope come first");
    const int64_t count = tokens.numel(), sequences = starts.numel() - 1, vocabulary = op.embedding_->out;
    Batch b{whole_numbers(tokens), whole_numbers(positions), whole_numbers(starts), whole_numbers(tables),
            expanded.data_ptr<bool>(), count, sequences, tables.size(1)};
    need(positions.numel() == count && tables.size(0) == sequences && expanded.numel() == sequences,
         "the parts of the batch do not fit together");
    need(b.starts[0] == 0 && b.starts[sequences] == count, "starts must run from 0 to the number of tokens");
    for (int64_t i = 0; i < count; ++i) {
      need(b.tokens[i] >= 0 && b.tokens[i] < vocabulary, "a token is outside the vocabulary");
      need(b.positions[i] >= 0 && b.positions[i] < cos.size(0), "a position is beyond the rope table");
      need((b.positions[i] >> op.block_bits_) < b.table_width, "a position is beyond its block table");
    }
    for (int64_t i = 0; i < sequences * b.table_width; ++i)
      need(b.tables[i] >= 0 && b.tables[i] < op.blocks_, "a block is outside the cache");
    for (int64_t m = 0; m < sequences; ++m) {
      need(b.starts[m] <= b.starts[m + 1], "starts must not fall");
      for (int64_t i = b.starts[m] + 1; i < b.starts[m + 1]; ++i)
        need(b.positions[i] == b.positions[i - 1] + 1, "positions of a sequence must be consecutive");
    }
    return b;
  }
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<Matrix, MatrixPtr>(m, "MatrixBase");
  py::class_<HeldMatrix, Matrix, std::shared_ptr<HeldMatrix>>(m, "Matrix")
      .def_property_readonly("bytes", [](const HeldMatrix& self) { return self.data_tensor.nbytes(); });
  m.def("float_matrix", &float_matrix, py::arg("weight"), py::arg("bias") = py::none());
  m.def("packed_matrix", &packed_matrix, py::arg("scheme"), py::arg("packed"), py::arg("out"), py::arg("in_"),
        py::arg("minimums") = false, py::arg("bias") = py::none());
  m.def("pack", &pack_matrix, py::arg("scheme"), py::arg("codes"), py::arg("scales"), py::arg("minimums") = py::none());
  m.def("packed_bytes", &packed_bytes);
  m.def("allocate", &allocate);
  // GB/s of a plain read by `threads` threads.
  m.def(
      "read_bandwidth",
      [](int threads, int64_t megabytes) {
        need(threads >= 1 && megabytes >= 1, "threads and megabytes must be 1 or more");
        return read_bandwidth(threads, megabytes << 20) / 1e9;
      },
      py::arg("threads"), py::arg("megabytes") = 512, py::call_guard<py::gil_scoped_release>());

  auto shape = py::class_<Shape>(m, "Shape").def(py::init<>());
#define FIELD(name) shape.def_readwrite(#name, &Shape::name)
  FIELD(hidden), FIELD(heads), FIELD(kv_heads), FIELD(head_dim), FIELD(rank), FIELD(nope), FIELD(rope), FIELD(value);
  FIELD(experts), FIELD(chosen), FIELD(groups), FIELD(kept_groups), FIELD(group_top), FIELD(mla), FIELD(interleaved);
  FIELD(sigmoid), FIELD(normalises), FIELD(limits_groups), FIELD(eps), FIELD(latent_eps), FIELD(scale);
  FIELD(routed_scale);
#undef FIELD

  auto layer = py::class_<Layer>(m, "Layer").def(py::init<>());
#define FIELD(name) layer.def_readwrite(#name, &Layer::name)
  FIELD(q), FIELD(q_a), FIELD(k), FIELD(v), FIELD(kv_a), FIELD(kv_b), FIELD(key_up), FIELD(o), FIELD(gate), FIELD(up);
  FIELD(down), FIELD(router);
#undef FIELD
  layer.def("add_expert", [](Layer& self, MatrixPtr gate, MatrixPtr up, MatrixPtr down) {
    self.experts.push_back({std::move(gate), std::move(up), std::move(down)});
  });

  py::class_<Model>(m, "Model")
      .def(py::init<Shape, int>())
      .def("add_layer",
           [](Model& self, Layer layer, const std::map<std::string, at::Tensor>& vectors) {
             for (const auto& [name, tensor] : vectors) {
               const float* p = self.keep(tensor);
               if (name == "input_norm") layer.input_norm = p;
               else if (name == "post_norm") layer.post_norm = p;
               else if (name == "q_norm") layer.q_norm = p;
               else if (name == "kv_norm") layer.kv_norm = p;
               else if (name == "router_bias") layer.router_bias = p;
               else throw std::invalid_argument("unknown vector " + name);
             }
             self.op.layers_.push_back(std::move(layer));
           })
      .def("add_draft",
           [](Model& self, const at::Tensor& embedding_norm, const at::Tensor& hidden_norm, const at::Tensor& norm,
              MatrixPtr join, int64_t layer) {
             DraftModule d;
             d.embedding_norm = self.keep(embedding_norm), d.hidden_norm = self.keep(hidden_norm);
             d.norm = self.keep(norm), d.join = std::move(join), d.layer = layer;
             self.op.drafts_.push_back(std::move(d));
           })
      .def("set_ends",
           [](Model& self, MatrixPtr embedding, MatrixPtr head, const at::Tensor& norm) {
             self.op.embedding_ = std::move(embedding), self.op.head_ = std::move(head);
             self.op.norm_ = self.keep(norm);
           })
      .def("set_cache",
           [](Model& self, const at::Tensor& cache) {
             need(cache.dim() == 4 && cache.is_contiguous() && cache.size(0) == int64_t(self.op.layers_.size()) &&
                      cache.size(3) == self.op.shape_.width(),
                  "the cache must be [layers, blocks, block size, width]");
             const auto type = cache.scalar_type();
             need(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, "the cache is fp32, fp16 or bf16");
             self.cache = cache;
             self.op.cache_ = cache.data_ptr();
             self.op.cache_type_ = type == at::kFloat ? Type::f32 : type == at::kHalf ? Type::f16 : Type::bf16;
             need((cache.size(2) & (cache.size(2) - 1)) == 0, "the block size must be a power of two");
             self.op.blocks_ = cache.size(1), self.op.block_bits_ = 0;
             while ((int64_t{1} << self.op.block_bits_) < cache.size(2)) ++self.op.block_bits_;
           })
      .def("set_rope",
           [](Model& self, const at::Tensor& cos, const at::Tensor& sin) {
             need(cos.dim() == 2 && cos.size(1) == self.op.shape_.pairs() && cos.sizes() == sin.sizes(),
                  "the rope tables must be [positions, pairs]");
             self.cos = cos, self.sin = sin;
             self.op.cos_ = floats(cos), self.op.sin_ = floats(sin);
           })
      .def("forward",
           [](Model& self, const at::Tensor& tokens, const at::Tensor& positions, const at::Tensor& starts,
              const at::Tensor& tables, const at::Tensor& expanded) {
             const Batch b = self.batch(tokens, positions, starts, tables, expanded);
             auto hidden = at::empty({b.count, self.op.shape_.hidden}, at::kFloat);
             auto* to = hidden.data_ptr<float>();
             py::gil_scoped_release release;
             self.op.forward(b, to);
             return hidden;
           })
      .def("logits",
           [](Model& self, const at::Tensor& hidden) {
             const float* from = floats(hidden);
             need(hidden.dim() == 2 && hidden.size(1) == self.op.shape_.hidden, "expected [n, hidden]");
             auto out = at::empty({hidden.size(0), self.op.head_->out}, at::kFloat);
             auto* to = out.data_ptr<float>();
             py::gil_scoped_release release;
             self.op.logits(from, hidden.size(0), to);
             return out;
           })
      .def("draft", [](Model& self, int64_t module, const at::Tensor& tokens, const at::Tensor& positions,
                       const at::Tensor& starts, const at::Tensor& tables, const at::Tensor& expanded,
                       const at::Tensor& states) {
        need(module >= 0 && module < int64_t(self.op.drafts_.size()), "no such MTP module");
        const Batch b = self.batch(tokens, positions, starts, tables, expanded);
        const float* from = floats(states);
        need(states.dim() == 2 && states.size(0) == b.count && states.size(1) == self.op.shape_.hidden,
             "expected a state [hidden] a token");
        auto hidden = at::empty({b.count, self.op.shape_.hidden}, at::kFloat);
        auto* to = hidden.data_ptr<float>();
        py::gil_scoped_release release;
        self.op.draft(module, b, from, to);
        return hidden;
      });
}
