// Slide Attention (the tap-wise form of tapwise.py) and neighborhood attention on a CPU, one pixel and head at a time, so
// that logits and products stay in registers. Maps are float32, bfloat16 or float16; the arithmetic is float32. Plain C
// symbols, nothing of PyTorch's or Python's, so that building takes a compiler alone. Shapes are those of mmslide.ops;
// native.py fills in the arguments.

#include <omp.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "float16 is converted on x86-64 and 64-bit Arm only"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 8;
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

struct BFloat16 {
  uint16_t bits;
};

inline Vec load(const BFloat16* from) {
#ifdef __x86_64__
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const IntVec bits = __builtin_convertvector(halves, IntVec) << 16;
#endif
  Vec x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Rounds to nearest, ties to even.
inline void store(BFloat16* to, Vec x) {
  IntVec bits;
  std::memcpy(&bits, &x, sizeof bits);
  const IntVec rounded = bits + 0x7fff + ((bits >> 16) & 1), nan = IntVec{} + 0x7fc00000;
  bits = x == x ? rounded : nan;
#ifdef __x86_64__
  __m256i wide;
  std::memcpy(&wide, &bits, sizeof wide);
  wide = _mm256_srli_epi32(wide, 16);
  const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0b1000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(narrow));
#else
  for (int i = 0; i < LANES; ++i) to[i].bits = static_cast<uint32_t>(bits[i]) >> 16;
#endif
}

struct Float16 {
  uint16_t bits;
};

inline Vec load(const Float16* from) {
  Vec x;
#ifdef __x86_64__
  const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  std::memcpy(&x, &wide, sizeof x);
#else
  float16x8_t halves;
  std::memcpy(&halves, from, sizeof halves);
  const float32x4_t wide[2] = {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
  std::memcpy(&x, wide, sizeof x);
#endif
  return x;
}

inline void store(Float16* to, Vec x) {
#ifdef __x86_64__
  __m256 wide;
  std::memcpy(&wide, &x, sizeof wide);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
#else
  float32x4_t wide[2];
  std::memcpy(wide, &x, sizeof wide);
  const float16x8_t halves = vcvt_high_f16_f32(vcvt_f16_f32(wide[0]), wide[1]);
  std::memcpy(to, &halves, sizeof halves);
#endif
}

// The channels of a pixel in float32: where they are, or in `memory`.
inline const float* widened(const float* from, std::vector<float>&) { return from; }

template <class T>
const float* widened(const T* from, std::vector<float>& memory) {
  for (size_t c = 0; c < memory.size(); c += LANES) store(memory.data() + c, load(from + c));
  return memory.data();
}

constexpr int AHEAD = 2;  // pixels, for prefetching
constexpr int AT_ONCE = 2;

template <class T>
inline void prefetch_channels(const T* from, int64_t count) {
  for (int64_t c = 0; c < count; c += 64 / sizeof(T)) __builtin_prefetch(from + c);
}

inline Vec all(float x) { return Vec{} + x; }

inline float sum(Vec x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// For x ≤ 0, to 1e-7: x is n · ln 2 + r with |r| ≤ ln 2 / 2, a Taylor polynomial of r times 2ⁿ. NaN stays NaN.
inline Vec exp_of_negative(Vec x) {
  const Vec least = all(-87.0f), rounding = all(0x1.8p23f);  // adding and subtracting the latter rounds
  x = x < least ? least : x;
  const Vec n = x * 1.442695041f + rounding - rounding;
  const Vec r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts, so that the large product is exact
  Vec result = all(1.0f);
  for (float divisor : {7.0f, 6.0f, 5.0f, 4.0f, 3.0f, 2.0f, 1.0f}) result = result * r * (1 / divisor) + 1.0f;
  const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return result * scale;
}

#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC before 12
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

inline Vec pair_sums(Vec a, Vec b) {
  return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

// The sum of each of eight vectors.
inline Vec sums(const Vec* x) {
  const Vec first = pair_sums(pair_sums(x[0], x[1]), pair_sums(x[2], x[3]));
  const Vec last = pair_sums(pair_sums(x[4], x[5]), pair_sums(x[6], x[7]));
  return SHUFFLE(first, last, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(first, last, 4, 5, 6, 7, 12, 13, 14, 15);
}

// Slots as whole vectors.
constexpr int padded(int slots) { return (slots + LANES - 1) / LANES * LANES; }

inline float largest(Vec x) {
  const Vec fours = SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  x = x > fours ? x : fours;
  const Vec twos = SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
  x = x > twos ? x : twos;
  return x[0] > x[1] ? x[0] : x[1];
}

// In place, of SLOTS logits in memory for padded(SLOTS), which ends in zeros, up to the factor that it returns. NaN in one
// makes all NaN.
template <int SLOTS>
inline float softmax(float* x) {
  const IntVec inside = IntVec{0, 1, 2, 3, 4, 5, 6, 7} < IntVec{} + (SLOTS - (padded(SLOTS) - LANES));
  float* last = x + padded(SLOTS) - LANES;
  store(last, inside ? load(last) : all(-INFINITY));
  Vec most = load(x), total = {};
  for (int j = LANES; j < padded(SLOTS); j += LANES) {
    const Vec part = load(x + j);
    most = part > most ? part : most;
  }
  const float shift = largest(most);
  for (int j = 0; j < padded(SLOTS); j += LANES) {
    Vec part = exp_of_negative(load(x + j) - shift);
    if (x + j == last) part = inside ? part : Vec{};
    total += part;
    store(x + j, part);
  }
  return 1 / sum(total);
}

}  // namespace

extern "C" {

struct Map {
  void* data;
  int64_t image, row, column, head;  // strides in numbers; channels are next to each other
};

struct Call {
  int64_t batch, height, width, heads, head_dims, kernel_size, threads;
  int64_t dtype;  // of q, k, v, out and grad_q: 0 float32, 1 bfloat16, 2 float16; everything else is float32
  float scale;
  Map q, k, v, out;               // in backward `out` is its gradient
  // (k² + 1, d / 8, k², 8), the biases last; (heads, k²). For neighborhood attention null; (heads, 2k - 1, 2k - 1).
  const float *kernels, *rpb;
  const float* mask;              // (B, H, W, heads, k²), or null
  Map grad_q, grad_k, grad_v;     // backward only
  float *grad_kernels, *grad_rpb;  // backward only, (threads, ...) of the above, zeros when it is called; or null
};
}

namespace {

template <class T>
T* at(const Map& map, int64_t image, int64_t row, int64_t column, int64_t head) {
  return static_cast<T*>(map.data) + image * map.image + row * map.row + column * map.column + head * map.head;
}

// Where the pixels of a window are in a map, counted from a pixel that is (row, column) before its corner.
template <class T, int K>
struct Window {
  const Map& map;
  const int64_t head_dims;
  int64_t offsets[K * K];

  Window(const Call& call, const Map& map, int64_t row, int64_t column) : map(map), head_dims(call.head_dims) {
    for (int i = 0; i < K * K; ++i) offsets[i] = (row + i / K) * map.row + (column + i % K) * map.column;
  }

  // The column that comes into the window in a moment. Processors do not foresee it, since the pixels of a head are far
  // from each other.
  void prefetch(const T* pixel) const {
    for (int i = K - 1; i < K * K; i += K) prefetch_channels(pixel + offsets[i] + AHEAD * map.column, head_dims);
  }
};

// Logits, then attention weights of a pixel and head, with and without dropout.
template <int SLOTS>
struct Weights {
  const float *mask, *dropped;
  float factor;
  alignas(32) float attention[padded(SLOTS)], masked[padded(SLOTS)];

  // From logits to weights, up to the factor.
  void softmax_and_drop() {
    factor = softmax<SLOTS>(attention);
    dropped = attention;
    if (!mask) return;
    for (int j = 0; j < SLOTS; ++j) masked[j] = attention[j] * mask[j];
    dropped = masked;
  }

  void normalize() {
    for (int j = 0; j < padded(SLOTS); j += LANES) store(attention + j, load(attention + j) * factor);
    if (mask)
      for (int j = 0; j < SLOTS; ++j) masked[j] *= factor;
  }
};

// HEAD_DIMS is that of the call, or 0 for any: the compiler unrolls loops over the usual ones.
template <class T, int K, int HEAD_DIMS>
struct SlidePixel : Weights<K * K> {
  static constexpr int SLOTS = K * K, TAPS = SLOTS + 1, POSITIONS = SLOTS;
  using Weights<SLOTS>::mask, Weights<SLOTS>::dropped, Weights<SLOTS>::factor, Weights<SLOTS>::attention;

  const Call& call;
  const Window<T, K> keys, values;
  const Window<float, K> grad_keys, grad_values;
  std::vector<T> ones;
  std::vector<float> unused, query_memory, grad_memory, biases;
  int64_t image, y, x, head;
  // Of each tap on the map, and of the bias, a tap whose neighbour is all ones.
  int64_t begin_row = -1, end_row, begin_column, end_column;
  int taps;
  int tap[SLOTS + 1];
  const T *key[SLOTS + 1], *value[SLOTS + 1];
  float *grad_key[SLOTS + 1], *grad_value[SLOTS + 1];
  const float *query, *rpb;
  float query_sum;

  explicit SlidePixel(const Call& call)
      : call(call),
        keys(call, call.k, -(K / 2), -(K / 2)),
        values(call, call.v, -(K / 2), -(K / 2)),
        grad_keys(call, call.grad_k, -(K / 2), -(K / 2)),
        grad_values(call, call.grad_v, -(K / 2), -(K / 2)),
        ones(call.head_dims),
        unused(call.head_dims),
        query_memory(call.head_dims),
        grad_memory(call.head_dims),
        biases(call.heads * padded(SLOTS)) {
    for (int64_t c = 0; c < call.head_dims; c += LANES) store(ones.data() + c, all(1.0f));
    for (int64_t i = 0; i < call.heads * SLOTS; ++i) biases[i / SLOTS * padded(SLOTS) + i % SLOTS] = call.rpb[i];
  }

  int64_t chunks() const { return (HEAD_DIMS ? HEAD_DIMS : call.head_dims) / LANES; }

  void place(int64_t at_image, int64_t at_y, int64_t at_x) {
    image = at_image, y = at_y, x = at_x;
    const int64_t top = std::max<int64_t>(K / 2 - y, 0), bottom = std::min<int64_t>(call.height + K / 2 - y, K);
    const int64_t left = std::max<int64_t>(K / 2 - x, 0), right = std::min<int64_t>(call.width + K / 2 - x, K);
    if (top == begin_row && bottom == end_row && left == begin_column && right == end_column) return;
    begin_row = top, end_row = bottom, begin_column = left, end_column = right;
    taps = 0;
    for (int64_t i = top; i < bottom; ++i)
      for (int64_t j = left; j < right; ++j) tap[taps++] = i * K + j;
    tap[taps] = SLOTS;
    key[taps] = value[taps] = ones.data();
    grad_key[taps] = grad_value[taps] = unused.data();
    ++taps;
  }

  void pick(int64_t at_head) {
    head = at_head;
    query = widened(at<T>(call.q, image, y, x, head), query_memory);
    rpb = biases.data() + head * padded(SLOTS);
    mask = call.mask;
    if (mask) mask += (((image * call.height + y) * call.width + x) * call.heads + head) * SLOTS;
    prefetch_channels(at<T>(call.q, image, y, x + AHEAD, head), call.head_dims);
    prefetch_channels(at<T>(call.out, image, y, x + AHEAD, head), call.head_dims);
    const T *own_key = at<T>(call.k, image, y, x, head), *own_value = at<T>(call.v, image, y, x, head);
    keys.prefetch(own_key);
    values.prefetch(own_value);
    for (int t = 0; t < taps - 1; ++t) {
      key[t] = own_key + keys.offsets[tap[t]];
      value[t] = own_value + values.offsets[tap[t]];
    }
    if (!call.grad_k.data) return;
    prefetch_channels(at<T>(call.grad_q, image, y, x + AHEAD, head), call.head_dims);
    float *own_grad_key = at<float>(call.grad_k, image, y, x, head);
    float *own_grad_value = at<float>(call.grad_v, image, y, x, head);
    grad_keys.prefetch(own_grad_key);
    grad_values.prefetch(own_grad_value);
    for (int t = 0; t < taps - 1; ++t) {
      grad_key[t] = own_grad_key + grad_keys.offsets[tap[t]];
      grad_value[t] = own_grad_value + grad_values.offsets[tap[t]];
    }
  }

  int64_t kernel(int t, int64_t chunk) const { return (tap[t] * chunks() + chunk) * SLOTS * LANES; }

  // Σ_t Σ_c x_c · map_c(p + t) · W[c, j, t] for each slot, biases included, then Σ_c x_c, in memory for padded(SLOTS).
  void gather(const float* x, const T* const* map, float* out) const {
    Vec sum_of[padded(SLOTS)] = {};
    for (int64_t c = 0; c < chunks(); ++c) sum_of[SLOTS] += load(x + c * LANES);
    for (int t = 0; t < taps; ++t)
      for (int64_t c = 0; c < chunks(); ++c) {
        const Vec product = load(x + c * LANES) * load(map[t] + c * LANES);
        const float* w = call.kernels + kernel(t, c);
        for (int j = 0; j < SLOTS; ++j) sum_of[j] += product * load(w + j * LANES);
      }
    for (int j = 0; j < padded(SLOTS); j += LANES) store(out + j, sums(sum_of + j));
  }

  void score() { gather(query, key, attention); }

  void attend() {
    query_sum = attention[SLOTS];
    for (int j = 0; j < padded(SLOTS); j += LANES)
      store(attention + j, call.scale * (load(attention + j) + query_sum * load(rpb + j)));
    this->softmax_and_drop();
  }

  void forward() {
    T* out = at<T>(call.out, image, y, x, head);
    for (int64_t c = 0; c < chunks(); ++c) {
      Vec result = {};
      for (int t = 0; t < taps; ++t) {
        const float* w = call.kernels + kernel(t, c);
        Vec kernel_sum = {};
        for (int j = 0; j < SLOTS; ++j) kernel_sum += dropped[j] * load(w + j * LANES);
        result += kernel_sum * load(value[t] + c * LANES);
      }
      store(out + c * LANES, result * factor);
    }
  }

  template <bool PARAMETERS>
  void backward(float* grad_kernels, float* grad_rpb) {
    this->normalize();
    const float* grad = widened(at<T>(call.out, image, y, x, head), grad_memory);
    T* grad_query = at<T>(call.grad_q, image, y, x, head);
    grad_rpb += head * POSITIONS;
    alignas(32) float grad_logits[padded(SLOTS)];
    gather(grad, value, grad_logits);
    if (mask)
      for (int j = 0; j < SLOTS; ++j) grad_logits[j] *= mask[j];
    Vec products = {}, of_query = {};
    for (int j = 0; j < padded(SLOTS); j += LANES) products += load(attention + j) * load(grad_logits + j);
    const float mean = sum(products);
    for (int j = 0; j < padded(SLOTS); j += LANES) {
      const Vec part = call.scale * load(attention + j) * (load(grad_logits + j) - mean);
      of_query += load(rpb + j) * part;
      store(grad_logits + j, part);
    }
    if constexpr (PARAMETERS)
      for (int j = 0; j < SLOTS; ++j) grad_rpb[j] += query_sum * grad_logits[j];
    const float of_query_sum = sum(of_query);
    for (int64_t c = 0; c < chunks(); ++c) {
      const Vec query_part = load(query + c * LANES), grad_part = load(grad + c * LANES);
      Vec result = all(of_query_sum);
      for (int t = 0; t < taps; ++t) {
        const Vec key_part = load(key[t] + c * LANES);
        const Vec key_product = query_part * key_part, value_product = grad_part * load(value[t] + c * LANES);
        const float* w = call.kernels + kernel(t, c);
        Vec key_sum = {}, value_sum = {};
        for (int j = 0; j < SLOTS; ++j) {
          key_sum += grad_logits[j] * load(w + j * LANES);
          value_sum += dropped[j] * load(w + j * LANES);
          if constexpr (PARAMETERS) {
            float* grad_w = grad_kernels + kernel(t, c) + j * LANES;
            store(grad_w, load(grad_w) + grad_logits[j] * key_product + dropped[j] * value_product);
          }
        }
        result += key_sum * key_part;
        float *to_key = grad_key[t] + c * LANES, *to_value = grad_value[t] + c * LANES;
        store(to_key, load(to_key) + key_sum * query_part);
        store(to_value, load(to_value) + value_sum * grad_part);
      }
      store(grad_query + c * LANES, result);
    }
  }
};

template <class T, int K>
struct NeighborhoodPixel : Weights<K * K> {
  static constexpr int SLOTS = K * K, TAPS = 0, SIDE = 2 * K - 1, POSITIONS = SIDE * SIDE;
  using Weights<SLOTS>::mask, Weights<SLOTS>::dropped, Weights<SLOTS>::factor, Weights<SLOTS>::attention;

  const Call& call;
  const int64_t chunks;
  const Window<T, K> keys, values;
  const Window<float, K> grad_keys, grad_values;
  int64_t image, y, x, head, top, left;
  const float *query, *rpb;
  std::vector<float> query_memory, grad_memory;
  int64_t position;  // of the first slot in rpb
  const T *key[SLOTS], *value[SLOTS];
  float *grad_key[SLOTS], *grad_value[SLOTS];

  explicit NeighborhoodPixel(const Call& call)
      : call(call),
        chunks(call.head_dims / LANES),
        keys(call, call.k, 0, 0),
        values(call, call.v, 0, 0),
        grad_keys(call, call.grad_k, 0, 0),
        grad_values(call, call.grad_v, 0, 0),
        query_memory(call.head_dims),
        grad_memory(call.head_dims) {}

  void place(int64_t at_image, int64_t at_y, int64_t at_x) {
    image = at_image, y = at_y, x = at_x;
    top = std::min(std::max<int64_t>(y - K / 2, 0), call.height - K);
    left = std::min(std::max<int64_t>(x - K / 2, 0), call.width - K);
    position = (top - y + K - 1) * SIDE + left - x + K - 1;
  }

  void pick(int64_t at_head) {
    head = at_head;
    query = widened(at<T>(call.q, image, y, x, head), query_memory);
    rpb = call.rpb + head * POSITIONS;
    mask = call.mask;
    if (mask) mask += (((image * call.height + y) * call.width + x) * call.heads + head) * SLOTS;
    prefetch_channels(at<T>(call.q, image, y, x + AHEAD, head), call.head_dims);
    prefetch_channels(at<T>(call.out, image, y, x + AHEAD, head), call.head_dims);
    const T *first_key = at<T>(call.k, image, top, left, head), *first_value = at<T>(call.v, image, top, left, head);
    keys.prefetch(first_key);
    values.prefetch(first_value);
    for (int j = 0; j < SLOTS; ++j) {
      key[j] = first_key + keys.offsets[j];
      value[j] = first_value + values.offsets[j];
    }
    if (!call.grad_k.data) return;
    prefetch_channels(at<T>(call.grad_q, image, y, x + AHEAD, head), call.head_dims);
    float *first_grad_key = at<float>(call.grad_k, image, top, left, head);
    float *first_grad_value = at<float>(call.grad_v, image, top, left, head);
    grad_keys.prefetch(first_grad_key);
    grad_values.prefetch(first_grad_value);
    for (int j = 0; j < SLOTS; ++j) {
      grad_key[j] = first_grad_key + grad_keys.offsets[j];
      grad_value[j] = first_grad_value + grad_values.offsets[j];
    }
  }

  // Σ_c x_c · map_c for each slot, in memory for padded(SLOTS): a row of the window at a time, and what is written too
  // much, the next row overwrites.
  void products(const float* x, const T* const* map, float* out) const {
    for (int i = 0; i < SLOTS; i += K) {
      Vec sum_of[LANES] = {};
      for (int64_t c = 0; c < chunks * LANES; c += LANES) {
        const Vec part = load(x + c);
        for (int j = 0; j < K; ++j) sum_of[j] += part * load(map[i + j] + c);
      }
      store(out + i, sums(sum_of));
    }
  }

  void score() { products(query, key, attention); }

  void attend() {
    for (int i = 0; i < K; ++i)
      for (int j = 0; j < K; ++j)
        attention[i * K + j] = call.scale * attention[i * K + j] + rpb[position + i * SIDE + j];
    this->softmax_and_drop();
  }

  void forward() {
    T* out = at<T>(call.out, image, y, x, head);
    for (int64_t c = 0; c < chunks * LANES; c += LANES) {
      Vec result[2] = {};  // two, since one sum would wait for itself
      for (int j = 0; j < SLOTS; ++j) result[j % 2] += dropped[j] * load(value[j] + c);
      store(out + c, (result[0] + result[1]) * factor);
    }
  }

  template <bool PARAMETERS>
  void backward(float*, float* grad_rpb) {
    this->normalize();
    const float* grad = widened(at<T>(call.out, image, y, x, head), grad_memory);
    T* grad_query = at<T>(call.grad_q, image, y, x, head);
    grad_rpb += head * POSITIONS;
    alignas(32) float grad_logits[padded(SLOTS)];
    products(grad, value, grad_logits);
    float mean = 0;
    if (mask)
      for (int j = 0; j < SLOTS; ++j) grad_logits[j] *= mask[j];
    for (int j = 0; j < SLOTS; ++j) mean += attention[j] * grad_logits[j];
    for (int j = 0; j < SLOTS; ++j) grad_logits[j] = attention[j] * (grad_logits[j] - mean);
    if constexpr (PARAMETERS)
      for (int i = 0; i < K; ++i)
        for (int j = 0; j < K; ++j) grad_rpb[position + i * SIDE + j] += grad_logits[i * K + j];
    for (int j = 0; j < SLOTS; ++j) grad_logits[j] *= call.scale;
    for (int64_t c = 0; c < chunks * LANES; c += LANES) {
      const Vec query_part = load(query + c), grad_part = load(grad + c);
      Vec result = {};
      for (int j = 0; j < SLOTS; ++j) {
        result += grad_logits[j] * load(key[j] + c);
        float *to_key = grad_key[j] + c, *to_value = grad_value[j] + c;
        store(to_key, load(to_key) + grad_logits[j] * query_part);
        store(to_value, load(to_value) + dropped[j] * grad_part);
      }
      store(grad_query + c, result);
    }
  }
};

template <class T, int K>
using SlidePixel32 = SlidePixel<T, K, 32>;
template <class T, int K>
using SlidePixel64 = SlidePixel<T, K, 64>;
template <class T, int K>
using AnySlidePixel = SlidePixel<T, K, 0>;

// Adds a row's sums to the total and starts the next row.
inline void add(std::vector<float>& row, float* total) {
  for (size_t i = 0; i < row.size(); ++i) total[i] += row[i];
  std::fill(row.begin(), row.end(), 0.0f);
}

// The pixels and heads of a row, AT_ONCE at a time, since the softmax of one would wait for itself.
template <class Pixel, class Function>
void for_row(std::vector<Pixel>& pixels, const Call& call, int64_t image, int64_t y, Function function) {
  int64_t x = 0, head = 0;
  while (x < call.width) {
    size_t count = 0;
    for (; count < pixels.size() && x < call.width; ++count) {
      pixels[count].place(image, y, x);
      pixels[count].pick(head);
      pixels[count].score();
      if (++head == call.heads) head = 0, ++x;
    }
    for (size_t i = 0; i < count; ++i) pixels[i].attend();
    for (size_t i = 0; i < count; ++i) function(pixels[i]);
  }
}

template <class T, template <class, int> class Pixel, int K>
void forward(const Call& call) {
#pragma omp parallel num_threads(call.threads)
  {
    std::vector<Pixel<T, K>> pixels(AT_ONCE, Pixel<T, K>(call));
#pragma omp for collapse(2) schedule(static)
    for (int64_t image = 0; image < call.batch; ++image)
      for (int64_t y = 0; y < call.height; ++y)
        for_row(pixels, call, image, y, [](auto& pixel) { pixel.forward(); });
  }
}

// The threads take strips of rows, whose pixels also add to the gradients of k and v in K / 2 rows of the strips beside
// them. So all even strips come first, then the odd ones, and no two that touch the same row run at a time.
template <class T, template <class, int> class Pixel, int K, bool PARAMETERS>
void backward(const Call& call) {
  const int64_t height = call.height, most = height / (K - 1);
  const int64_t strips = most < 2 ? 1 : std::min(most, 2 * call.threads);
  const int64_t kernels = PARAMETERS ? Pixel<T, K>::TAPS * call.head_dims * K * K : 0;
  const int64_t positions = PARAMETERS ? call.heads * Pixel<T, K>::POSITIONS : 0;
#pragma omp parallel num_threads(call.threads)
  {
    Pixel<T, K> pixel(call);
    float* grad_kernels = call.grad_kernels + omp_get_thread_num() * kernels;
    float* grad_rpb = call.grad_rpb + omp_get_thread_num() * positions;
    // Sums of one row, since a sum over all pixels would lose digits.
    std::vector<float> row_kernels(kernels), row_rpb(positions);
    for (int64_t parity = 0; parity < 2; ++parity) {
#pragma omp for collapse(2) schedule(static)
      for (int64_t image = 0; image < call.batch; ++image)
        for (int64_t strip = parity; strip < strips; strip += 2)
          for (int64_t y = strip * height / strips; y < (strip + 1) * height / strips; ++y) {
            for (int64_t x = 0; x < call.width; ++x) {
              pixel.place(image, y, x);
              for (int64_t head = 0; head < call.heads; ++head) {
                pixel.pick(head);
                pixel.score();
                pixel.attend();
                pixel.template backward<PARAMETERS>(row_kernels.data(), row_rpb.data());
              }
            }
            add(row_kernels, grad_kernels);
            add(row_rpb, grad_rpb);
          }
    }
  }
}

template <class T, template <class, int> class Pixel, int K>
void run(const Call& call) {
  if (!call.grad_k.data) forward<T, Pixel, K>(call);
  else if (call.grad_rpb) backward<T, Pixel, K, true>(call);
  else backward<T, Pixel, K, false>(call);
}

template <template <class, int> class Pixel, int K>
void run(const Call& call) {
  if (call.dtype == 0) run<float, Pixel, K>(call);
  if (call.dtype == 1) run<BFloat16, Pixel, K>(call);
  if (call.dtype == 2) run<Float16, Pixel, K>(call);
}

template <template <class, int> class Pixel>
void run(const Call& call) {
  if (call.kernel_size == 3) run<Pixel, 3>(call);
  if (call.kernel_size == 5) run<Pixel, 5>(call);
  if (call.kernel_size == 7) run<Pixel, 7>(call);
}

}  // namespace

extern "C" {

int slide_attention_version() { return 4; }

// Before a large result is written: pages of 2 MiB instead of 4 KiB, where the system leaves that to programs. Handing out
// small ones takes up to half as long as the arithmetic.
void slide_attention_large_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 1 << 21, begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Forward, or backward if the gradient of k has memory. The kernel sizes and dtypes are those that native.py lets through.
void slide_attention(const Call* call) {
  if (call->kernel_size == 3 && call->head_dims == 32) run<SlidePixel32, 3>(*call);
  else if (call->kernel_size == 3 && call->head_dims == 64) run<SlidePixel64, 3>(*call);
  else run<AnySlidePixel>(*call);
}

void neighborhood_attention(const Call* call) { run<NeighborhoodPixel>(*call); }
}
