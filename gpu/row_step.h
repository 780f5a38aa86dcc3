// A step of decode: a few rows of tokens of a sequence, or the next token of each of several,
// through all layers, from their ids to the logits of each sequence's last one, by operations of
// the device alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "client/rung_attends.h"
#include "gpu/device.h"
#include "gpu/layer_math.h"
#include "gpu/local_kv.h"
#include "gpu/model.h"

namespace quarry {

// What changes from token to token reaches the operations through the device's memory, by one
// upload, so that they can be recorded: they are once two steps running used the same memory (the
// first one also loads what the device loads late), and are replayed until it changes. Where the
// device keeps no recordings, or weights come and go, every step calls them anew. Not
// thread-safe. Model, device and math outlive it.
class RowStep {
 public:
  enum class Recording { kOff, kOn };
  struct Options {
    uint32_t sequences = 1;
    uint32_t rows = 1;  // of each; one, where there are several
    // Where attention's other part comes from: the daemon's answers, or nowhere.
    LayerMath::Answers answers = LayerMath::Answers::kNone;
    Recording recording = Recording::kOn;
  };
  // One sequence of a step.
  struct Member {
    uint32_t first = 0;              // the token of its first row
    const RopeSpec* rope = nullptr;  // the same whenever the step runs
    std::span<const LocalKv> local;  // has been extended by the rows, layer by layer
  };
  // Takes the memory of all rows, with that of logits. Errors are those of Allocate.
  static absl::StatusOr<std::unique_ptr<RowStep>> Create(const Model& model, Device& device,
                                                         LayerMath& math, const KvShape& shape,
                                                         const Options& options);

  uint32_t sequences() const { return options_.sequences; }
  uint32_t rows() const { return options_.sequences * options_.rows; }  // of all
  // Whether steps after this one may be replays.
  bool records() const { return options_.recording == Recording::kOn; }
  uint64_t replays() const { return replays_; }  // so far

  // Calls the operations for rows with these ids, one member's behind the other's. `rung` has a
  // message for each layer; null without the daemon. After an error nothing is rung.
  absl::Status Run(std::span<const uint32_t> ids, std::span<const Member> members,
                   const RungAttends* rung);
  // Both wait for the operations. What was seen of the answers, [layers][RungOutcomeBytes(rows)].
  absl::StatusOr<std::vector<std::byte>> Outcomes();
  // After each sequence's last token, which has this number, as LayerMath's.
  absl::StatusOr<std::vector<Prediction>> Predict(std::span<const uint32_t> last,
                                                  std::span<const TokenDraw> draws);

 private:
  // The memory that recorded operations use beside the step's own.
  struct Frame {
    RungLayout layout;
    const std::byte* slot = nullptr;
    std::vector<uint32_t> answered_bits;    // by layer
    // By member and layer; without the growing part's tokens.
    std::vector<std::vector<DeviceKv>> kv;
    uint64_t weight_moves = 0;  // before the step
    bool operator==(const Frame&) const = default;
  };
  // What the host says of a step: offsets in told_.
  struct Told {
    size_t messages = 0, heads = 0, bytes = 0;  // places are at its beginning
  };

  RowStep(const Model& model, Device& device, LayerMath& math, const KvShape& shape,
          const Options& options);
  Told Layout(const RungAttends* rung) const;
  absl::Status Tell(std::span<const Member> members, const RungAttends* rung);
  Frame FrameOf(std::span<const Member> members, const RungAttends* rung) const;
  void Call(std::span<const Member> members, const RungAttends* rung);
  void AttendLocal(uint32_t layer, std::span<const Member> members);
  DeviceRing RingOf(uint32_t layer, const RungAttends& rung) const;
  const DevicePlace* PlaceOf(uint32_t layer, size_t member) const {
    return reinterpret_cast<const DevicePlace*>(told_.raw()) + layer * options_.sequences + member;
  }

  const Model& model_;
  Device& device_;
  LayerMath& math_;
  const KvShape shape_;
  Options options_;
  DeviceBuffer x_;              // [rows][hidden]
  DeviceBuffer norm_, logits_;  // [sequences][hidden], [sequences][vocab] of the last rows
  DeviceBuffer outcomes_;       // [layers][RungOutcomeBytes(rows)]
  DeviceBuffer told_;  // DevicePlace[layers][sequences], RungMessage[layers], the messages' heads
  LayerScratch scratch_;
  Frame frame_;                                 // of the step before
  std::unique_ptr<DeviceRecording> recording_;  // for frame_; null: none yet
  uint64_t replays_ = 0;
};

}  // namespace quarry
