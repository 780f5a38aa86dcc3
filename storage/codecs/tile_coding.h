// Coding of tiles, written once in vectors of the compiler and compiled anew for every instruction
// set, each with its own width: everything stands in an unnamed namespace. No operation joins a
// product and a sum (the targets forbid it), so that every level gives the same bytes.
#pragma once

#include "storage/codecs/tile_vector.h"

namespace quarry::codecs {
namespace {

using coded::kInt4;
using coded::kInt8;
using coded::kKey;
using coded::kLaneTokens;
using coded::kTileTokens;
using coded::kValueChannels;

// Numbers beyond it count as it, so that no sum or product of what is decoded overflows.
constexpr float kMostNumber = 0x1p120f;
// Smaller scales have no inverse worth the name.
constexpr float kLeastScale = 0x1p-100f;

// What codes of a tile are made with and mean: (x - zero) * inverse, and zero + scale * code. By
// token for 8 bits ([tokens]), by channel for keys of int4 ([head_dim]), by group of channels and
// token for its values ([groups][kTileTokens]).
constexpr uint32_t kMostScales = coded::ValueGroups(kMaxHeadDim) * kTileTokens > kMaxHeadDim
                                     ? coded::ValueGroups(kMaxHeadDim) * kTileTokens
                                     : kMaxHeadDim;
struct Scales {
  alignas(64) float scale[kMostScales];
  alignas(64) float inverse[kMostScales];
  alignas(64) float zero[kMostScales];
};

template <uint8_t kDtype>
inline Floats LoadNumbers(const Tile& tile, const void* rows, uint32_t token, uint32_t channel) {
  const Floats x = Widen<kDtype>(rows, size_t{token} * tile.head_dim + channel);
  // The last sum makes -0 a 0: which of the two is the least must not depend on the order.
  return Least(Most(x, All(-kMostNumber)), All(kMostNumber)) + All(0.0f);
}

// Scales are few: a loop over what a vector holds is short beside the numbers themselves.
inline float ScaleFor(float range, float most_code) {
  const float scale = UpToBf16(All(range / most_code))[0];
  return scale > kLeastScale ? scale : kLeastScale;
}

// --- What scales a tile has.

template <uint8_t kDtype>
void FindTokenScales(const Tile& tile, const void* rows, float most_code, Scales* scales) {
  for (uint32_t t = 0; t < tile.tokens; ++t) {
    Floats most = All(0.0f);
    for (uint32_t c = 0; c < tile.head_dim; c += kWidth) {
      most = Most(most, Magnitude(LoadNumbers<kDtype>(tile, rows, t, c)));
    }
    scales->scale[t] = ScaleFor(MostLane(most), most_code);
    scales->inverse[t] = 1.0f / scales->scale[t];
  }
}

template <uint8_t kDtype>
void FindChannelScales(const Tile& tile, const void* rows, Scales* scales) {
  for (uint32_t c = 0; c < tile.head_dim; c += kWidth) {
    Floats least = LoadNumbers<kDtype>(tile, rows, 0, c), most = least;
    for (uint32_t t = 1; t < tile.tokens; ++t) {
      const Floats x = LoadNumbers<kDtype>(tile, rows, t, c);
      least = Least(least, x);
      most = Most(most, x);
    }
    const Floats zero = DownToBf16(least);
    const Floats step = Most(UpToBf16((most - zero) / All(coded::kInt4Most)), All(kLeastScale));
    Store(scales->zero + c, zero);
    Store(scales->scale + c, step);
    Store(scales->inverse + c, All(1.0f) / step);
  }
}

template <uint8_t kDtype>
void FindGroupScales(const Tile& tile, const void* rows, Scales* scales) {
  for (uint32_t t = 0; t < tile.tokens; ++t) {
    for (uint32_t first = 0; first < tile.head_dim; first += kValueChannels) {
      const uint32_t end =
          first + kValueChannels < tile.head_dim ? first + kValueChannels : tile.head_dim;
      Floats least = LoadNumbers<kDtype>(tile, rows, t, first), most = least;
      for (uint32_t c = first + kWidth; c < end; c += kWidth) {
        const Floats x = LoadNumbers<kDtype>(tile, rows, t, c);
        least = Least(least, x);
        most = Most(most, x);
      }
      const uint32_t at = first / kValueChannels * kTileTokens + t;
      scales->zero[at] = DownToBf16(All(-MostLane(-least)))[0];
      scales->scale[at] = ScaleFor(MostLane(most) - scales->zero[at], coded::kInt4Most);
      scales->inverse[at] = 1.0f / scales->scale[at];
    }
  }
}

// Writes n numbers that bf16 holds.
inline uint8_t* PutBf16(const float* x, uint32_t n, uint8_t* out) {
  for (uint32_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof(bits));
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    __builtin_memcpy(out + i * 2, &half, sizeof(half));
  }
  return out + n * 2;
}

inline const uint8_t* GetBf16(const uint8_t* in, uint32_t n, float* x) {
  for (uint32_t i = 0; i < n; ++i) {
    uint16_t half;
    __builtin_memcpy(&half, in + i * 2, sizeof(half));
    const uint32_t bits = uint32_t{half} << 16;
    __builtin_memcpy(x + i, &bits, sizeof(bits));
  }
  return in + n * 2;
}

template <uint8_t kCodec, uint8_t kPart>
void PutScales(const Tile& tile, const Scales& scales, uint8_t* out) {
  if constexpr (kCodec != kInt4) {
    PutBf16(scales.scale, tile.tokens, out);
  } else if constexpr (kPart == kKey) {
    PutBf16(scales.zero, tile.head_dim, PutBf16(scales.scale, tile.head_dim, out));
  } else {
    const uint32_t filled = coded::FilledTokens(tile.tokens);
    for (uint32_t g = 0; g < coded::ValueGroups(tile.head_dim); ++g) {
      PutBf16(scales.scale + g * kTileTokens, tile.tokens, out);
      PutBf16(scales.zero + g * kTileTokens, tile.tokens, out + filled * 2);
      out += filled * 4;
    }
  }
}

template <uint8_t kCodec, uint8_t kPart>
void GetScales(const Tile& tile, const uint8_t* in, Scales* scales) {
  if constexpr (kCodec != kInt4) {
    GetBf16(in, tile.tokens, scales->scale);
  } else if constexpr (kPart == kKey) {
    GetBf16(GetBf16(in, tile.head_dim, scales->scale), tile.head_dim, scales->zero);
  } else {
    const uint32_t filled = coded::FilledTokens(tile.tokens);
    for (uint32_t g = 0; g < coded::ValueGroups(tile.head_dim); ++g) {
      GetBf16(in, tile.tokens, scales->scale + g * kTileTokens);
      GetBf16(in + filled * 2, tile.tokens, scales->zero + g * kTileTokens);
      in += filled * 4;
    }
  }
}

// --- A number's code, and back.

// Of token t and channels [c, c + kWidth): where their scales lie, alike for all lanes or not.
template <uint8_t kCodec, uint8_t kPart>
inline Floats ScalesAt(const float* of, uint32_t t, uint32_t c) {
  if constexpr (kCodec == kInt4 && kPart == kKey) {
    return LoadFloats(of + c);
  } else if constexpr (kCodec == kInt4) {
    return All(of[c / kValueChannels * kTileTokens + t]);
  } else {
    return All(of[t]);
  }
}

template <uint8_t kCodec, uint8_t kPart, uint8_t kDtype>
inline Ints CodesAt(const Tile& tile, const void* rows, const Scales& scales, uint32_t t,
                    uint32_t c) {
  Floats x = LoadNumbers<kDtype>(tile, rows, t, c);
  if constexpr (kCodec == kInt4) x -= ScalesAt<kCodec, kPart>(scales.zero, t, c);
  x *= ScalesAt<kCodec, kPart>(scales.inverse, t, c);
  if constexpr (kCodec == kInt4) return Rounded(Least(Most(x, All(0)), All(coded::kInt4Most)));
  if constexpr (kCodec == kInt8) {
    return Rounded(Least(Most(x, All(-coded::kInt8Most)), All(coded::kInt8Most))) +
           coded::kInt8Excess;
  }
  return ToE4m3(x);
}

template <uint8_t kCodec, uint8_t kPart>
inline Floats NumbersOf(const Scales& scales, Ints codes, uint32_t t, uint32_t c) {
  const Floats scale = ScalesAt<kCodec, kPart>(scales.scale, t, c);
  if constexpr (kCodec == kInt4) {
    return ScalesAt<kCodec, kPart>(scales.zero, t, c) + scale * ToFloats(codes);
  }
  if constexpr (kCodec == kInt8) return scale * ToFloats(codes - coded::kInt8Excess);
  return scale * FromE4m3(codes);
}

// --- Words of codes.

// The words of a token's key among those of kLaneTokens tokens.
template <uint8_t kCodec>
inline size_t KeyWordsAt(const Tile& tile, uint32_t t) {
  return size_t{t / kLaneTokens} * coded::CodeBytes(kCodec, tile.head_dim, kLaneTokens) +
         t % kLaneTokens * coded::WordBytes(kCodec);
}

template <uint8_t kCodec, uint8_t kDtype>
void EncodeKeys(const Tile& tile, const void* rows, const Scales& scales, uint8_t* out) {
  constexpr uint32_t kEach = coded::WordCodes(kCodec), kBytes = coded::WordBytes(kCodec);
  alignas(64) uint8_t codes[kMaxHeadDim];
  for (uint32_t t = 0; t < tile.tokens; ++t) {
    for (uint32_t c = 0; c < tile.head_dim; c += kWidth) {
      StoreBytes(codes + c, CodesAt<kCodec, kKey, kDtype>(tile, rows, scales, t, c));
    }
    uint8_t* to = out + KeyWordsAt<kCodec>(tile, t);
    for (uint32_t c = 0; c < tile.head_dim; c += kEach, to += kLaneTokens * kBytes) {
      uint32_t word;
      __builtin_memcpy(&word, codes + c, kBytes);
      if constexpr (kCodec == kInt4) {
        uint32_t high;
        __builtin_memcpy(&high, codes + c + 4, sizeof(high));
        word |= high << 4;
      }
      __builtin_memcpy(to, &word, kBytes);
    }
  }
}

template <uint8_t kCodec, uint8_t kDtype>
void DecodeKeys(const Tile& tile, const uint8_t* in, const Scales& scales, void* rows) {
  constexpr uint32_t kEach = coded::WordCodes(kCodec), kBytes = coded::WordBytes(kCodec);
  alignas(64) uint8_t codes[kMaxHeadDim];
  for (uint32_t t = 0; t < tile.tokens; ++t) {
    const uint8_t* from = in + KeyWordsAt<kCodec>(tile, t);
    for (uint32_t c = 0; c < tile.head_dim; c += kEach, from += kLaneTokens * kBytes) {
      uint32_t word;
      __builtin_memcpy(&word, from, kBytes);
      if constexpr (kCodec == kInt4) {
        const uint32_t high = word >> 4 & 0x0f0f0f0fu;
        word &= 0x0f0f0f0fu;
        __builtin_memcpy(codes + c + 4, &high, sizeof(high));
      }
      __builtin_memcpy(codes + c, &word, kBytes);
    }
    for (uint32_t c = 0; c < tile.head_dim; c += kWidth) {
      Narrow<kDtype>(NumbersOf<kCodec, kKey>(scales, LoadBytes(codes + c), t, c), rows,
                     size_t{t} * tile.head_dim + c);
    }
  }
}

// Where a value's code lies in its word: tokens in bytes, and with int4 four more in the high bits.
constexpr uint32_t ShiftOf(uint32_t token) { return token % 4 * 8 + token / 4 * 4; }

template <uint8_t kCodec, uint8_t kDtype>
void EncodeValues(const Tile& tile, const void* rows, const Scales& scales, uint8_t* out) {
  constexpr uint32_t kEach = coded::WordCodes(kCodec);
  for (uint32_t first = 0; first < tile.tokens; first += kEach) {
    const uint32_t tokens = tile.tokens - first < kEach ? tile.tokens - first : kEach;
    for (uint32_t c = 0; c < tile.head_dim; c += kWidth) {
      Ints words = {};
      for (uint32_t j = 0; j < tokens; ++j) {
        words |= CodesAt<kCodec, coded::kValue, kDtype>(tile, rows, scales, first + j, c)
                 << ShiftOf(j);
      }
      out = StoreWords<coded::WordBytes(kCodec)>(words, out);
    }
  }
}

template <uint8_t kCodec, uint8_t kDtype>
void DecodeValues(const Tile& tile, const uint8_t* in, const Scales& scales, void* rows) {
  constexpr uint32_t kEach = coded::WordCodes(kCodec);
  for (uint32_t first = 0; first < tile.tokens; first += kEach) {
    const uint32_t tokens = tile.tokens - first < kEach ? tile.tokens - first : kEach;
    for (uint32_t c = 0; c < tile.head_dim; c += kWidth) {
      Ints words;
      in = LoadWords<coded::WordBytes(kCodec)>(in, &words);
      for (uint32_t j = 0; j < tokens; ++j) {
        const Ints codes = words >> ShiftOf(j) & (kCodec == kInt4 ? 15 : 255);
        Narrow<kDtype>(NumbersOf<kCodec, coded::kValue>(scales, codes, first + j, c), rows,
                       size_t{first + j} * tile.head_dim + c);
      }
    }
  }
}

// --- Whole tiles.

template <uint8_t kCodec, uint8_t kPart, uint8_t kDtype>
void EncodeAs(const Tile& tile, const void* rows, uint8_t* out) {
  const uint32_t scale_bytes = coded::ScaleBytes(kCodec, kPart, tile.head_dim, tile.tokens);
  // What tokens are filled up with, and what is behind the last scale.
  if (tile.tokens % kLaneTokens != 0) {
    __builtin_memset(out, 0, coded::TileBytes(kCodec, kPart, tile.head_dim, tile.tokens));
  } else if (kCodec != kInt4) {
    __builtin_memset(out, 0, scale_bytes);
  }
  Scales scales;
  if constexpr (kCodec != kInt4) {
    FindTokenScales<kDtype>(tile, rows, kCodec == kInt8 ? coded::kInt8Most : coded::kFp8Most,
                            &scales);
  } else if constexpr (kPart == kKey) {
    FindChannelScales<kDtype>(tile, rows, &scales);
  } else {
    FindGroupScales<kDtype>(tile, rows, &scales);
  }
  PutScales<kCodec, kPart>(tile, scales, out);
  if constexpr (kPart == kKey) {
    EncodeKeys<kCodec, kDtype>(tile, rows, scales, out + scale_bytes);
  } else {
    EncodeValues<kCodec, kDtype>(tile, rows, scales, out + scale_bytes);
  }
}

template <uint8_t kCodec, uint8_t kPart, uint8_t kDtype>
void DecodeAs(const Tile& tile, const uint8_t* coded, void* rows) {
  Scales scales;
  GetScales<kCodec, kPart>(tile, coded, &scales);
  coded += coded::ScaleBytes(kCodec, kPart, tile.head_dim, tile.tokens);
  if constexpr (kPart == kKey) {
    DecodeKeys<kCodec, kDtype>(tile, coded, scales, rows);
  } else {
    DecodeValues<kCodec, kDtype>(tile, coded, scales, rows);
  }
}

// Calls f with codec, part and dtype as constants.
template <typename F>
inline void WithKinds(const Tile& tile, F&& f) {
  const auto with_dtype = [&]<uint8_t kCodec, uint8_t kPart>() {
    if (tile.dtype == kBf16) return f.template operator()<kCodec, kPart, kBf16>();
    if (tile.dtype == kFp16) return f.template operator()<kCodec, kPart, kFp16>();
    f.template operator()<kCodec, kPart, kFp32>();
  };
  const auto with_part = [&]<uint8_t kCodec>() {
    if (tile.part == kKey) return with_dtype.template operator()<kCodec, kKey>();
    with_dtype.template operator()<kCodec, coded::kValue>();
  };
  if (tile.codec == kInt4) return with_part.template operator()<kInt4>();
  if (tile.codec == kInt8) return with_part.template operator()<kInt8>();
  with_part.template operator()<coded::kFp8>();
}

void Encode(const Tile& tile, const void* rows, uint8_t* out) {
  WithKinds(tile, [&]<uint8_t kCodec, uint8_t kPart, uint8_t kDtype>() {
    EncodeAs<kCodec, kPart, kDtype>(tile, rows, out);
  });
}

void Decode(const Tile& tile, const uint8_t* coded, void* rows) {
  WithKinds(tile, [&]<uint8_t kCodec, uint8_t kPart, uint8_t kDtype>() {
    DecodeAs<kCodec, kPart, kDtype>(tile, coded, rows);
  });
}

}  // namespace
}  // namespace quarry::codecs
