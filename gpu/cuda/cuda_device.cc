#include "gpu/cuda/cuda_device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gpu/cuda/arena.h"
#include "gpu/cuda/attention.h"
#include "gpu/cuda/copy_stream.h"
#include "gpu/cuda/cuda_sparse_kernels.h"
#include "gpu/cuda/cuda_status.h"
#include "gpu/cuda/driver.h"
#include "gpu/cuda/overhead.h"
#include "gpu/cuda/parts_attention.h"
#include "gpu/cuda/recording.h"
#include "gpu/cuda/ring_kernels.h"
#include "gpu/cuda/row_kernels.h"
#include "gpu/cuda/sparse_prefill.h"
#include "gpu/cuda/staging.h"
#include "gpu/cuda/token_choice.h"
#include "gpu/cuda/weight_kernels.h"
#include "gpu/cuda/weight_products.h"
#include "proto/status_macros.h"

namespace quarry::cuda {
namespace {

class CudaDevice final : public Device {
 public:
  static absl::StatusOr<std::unique_ptr<Device>> Create(const CudaDeviceOptions& options) {
    std::unique_ptr<CudaDevice> out(new CudaDevice(options));
    QUARRY_RETURN_IF_ERROR(out->FindCard());
    QUARRY_RETURN_IF_ERROR(out->Start());
    return std::unique_ptr<Device>(std::move(out));
  }

  ~CudaDevice() override {
    if (stream_ == nullptr) return;
    cudaSetDevice(options_.ordinal);
    cudaStreamSynchronize(stream_);
    products_.reset();
    uploads_.reset();
    downloads_.reset();
    staging_.reset();
    ring_arrived_.Reset();
    arena_.reset();
    cudaStreamDestroy(stream_);
  }

  std::string_view name() const override { return name_; }

  absl::StatusOr<DeviceBuffer> Allocate(size_t bytes, std::string_view what) override {
    QUARRY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(options_.ordinal), what));
    // Nothing is given back meanwhile: what is recorded may read it at every replay.
    if (recorded_ != nullptr) {
      QUARRY_ASSIGN_OR_RETURN(void* const data, recorded_->Allocate(bytes, what));
      return DeviceBuffer(this, data, bytes);
    }
    QUARRY_ASSIGN_OR_RETURN(void* const data, AllocateBeforeSpare(bytes, what));
    return DeviceBuffer(this, data, bytes);
  }

  absl::StatusOr<DeviceBuffer> AllocateSpare(size_t bytes, size_t leave_free,
                                             std::string_view what) override {
    QUARRY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(options_.ordinal), what));
    QUARRY_ASSIGN_OR_RETURN(void* const data, arena_->AllocateSpare(bytes, leave_free, what));
    leave_end_ = leave_free / 4;
    return DeviceBuffer(this, data, bytes);
  }

  // What is still to run on this memory runs before whatever its next owner asks for.
  void Release(void* data, size_t bytes) override {
    if (recorded_ == nullptr || !recorded_->Release(data)) arena_->Release(data, bytes);
  }

  DeviceStats Stats() const override {
    DeviceStats stats;
    stats.capacity_bytes = options_.capacity_bytes;
    stats.used_bytes = arena_->map().used();
    stats.peak_bytes = arena_->map().peak();
    stats.overhead_bytes = arena_->map().overhead();
    stats.mapped_bytes = arena_->mapped_bytes();
    stats.driver_used_bytes = cudaSetDevice(options_.ordinal) == cudaSuccess ? TakenBytes() : 0;
    return stats;
  }

  absl::Status Upload(void* to, std::span<const std::byte> from) override {
    if (Begin("Upload")) Note(staging_->Upload(to, from), "Upload");
    return TakeFailure();
  }

  absl::Status Download(std::span<std::byte> to, const void* from) override {
    if (Begin("Download")) Note(staging_->Download(to, from), "Download");
    return TakeFailure();
  }

  void Copy(const DeviceCopy& c) override {
    if (c.bytes == 0 || c.count == 0 || !Begin("Copy")) return;
    Note(LaunchCopy({static_cast<char*>(c.to), c.to_stride, static_cast<const char*>(c.from),
                     c.from_stride, c.bytes, c.count},
                    stream_),
         "Copy");
  }

  absl::StatusOr<HostBuffer> AllocateHost(size_t bytes, std::string_view what) override {
    QUARRY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(options_.ordinal), what));
    void* data = nullptr;
    QUARRY_RETURN_IF_ERROR(
        CudaStatus(AllocatePinned(bytes, &data),
                   absl::StrCat("pinned host memory: ", bytes, " bytes for ", std::string(what))));
    return HostBuffer(this, {static_cast<std::byte*>(data), bytes});
  }
  void ReleaseHost(std::span<std::byte> bytes) override {
    cudaSetDevice(options_.ordinal);
    for (CopyStream* copies : {uploads_.get(), downloads_.get()}) (void)copies->AwaitAll();
    cudaStreamSynchronize(stream_);
    cudaFreeHost(bytes.data());
  }

  UploadTicket StartUpload(void* to, std::span<const std::byte> from) override {
    UploadTicket number = 0;
    if (Begin("StartUpload"))
      Note(uploads_->Start(to, from.data(), from.size(), &number), "StartUpload");
    return number;
  }
  void WaitFor(UploadTicket upload) override {
    if (Begin("WaitFor")) Note(uploads_->WaitFor(upload), "WaitFor");
  }

  DownloadTicket StartDownload(std::span<std::byte> to, const void* from) override {
    DownloadTicket number = 0;
    if (Begin("StartDownload")) {
      Note(downloads_->Start(to.data(), from, to.size(), &number), "StartDownload");
    }
    return number;
  }
  void WaitForDownload(DownloadTicket download) override {
    if (Begin("WaitForDownload")) Note(downloads_->WaitFor(download), "WaitForDownload");
  }
  absl::Status FinishDownload(DownloadTicket download) override {
    if (Begin("FinishDownload")) Note(downloads_->Await(download), "FinishDownload");
    return TakeFailure();
  }

  DType WeightDType(DType stored) const override { return stored; }

  void MatMul(const float* x, const DeviceMatrix& w, float* y, size_t rows,
              Output output) override {
    if (rows == 0 || w.rows == 0 || !Begin("MatMul")) return;
    Note(products_->Multiply(x, w, y, rows, output), "MatMul");
  }

  void RmsNorm(const float* x, const DeviceMatrix& weight, float eps, float* y,
               size_t rows) override {
    if (rows == 0 || weight.width == 0 || !Begin("RmsNorm")) return;
    Note(LaunchRmsNorm({x, weight.data.raw(), weight.dtype, y, rows, weight.width, eps}, stream_),
         "RmsNorm");
  }

  void Rope(const DeviceRope& rope) override {
    if (rope.rows == 0 || rope.heads == 0 || rope.inv_freq.empty() || !Begin("Rope")) return;
    if (rope.inv_freq.size() > kMaxRopePairs) {
      return Note(absl::InvalidArgumentError(absl::StrCat(
                      rope.inv_freq.size(), " frequencies, at most ", kMaxRopePairs)),
                  "Rope");
    }
    RopeArgs args = {};
    args.x = rope.x;
    args.first_token = rope.first_token;
    args.rows = rope.rows;
    args.heads = rope.heads;
    args.head_dim = rope.head_dim;
    args.pairs = static_cast<uint32_t>(rope.inv_freq.size());
    args.attention_scale = rope.attention_scale;
    args.place = rope.place;
    args.place_each = rope.place_each;
    std::copy(rope.inv_freq.begin(), rope.inv_freq.end(), args.inv_freq);
    Note(LaunchRope(args, stream_), "Rope");
  }

  void SwiGlu(const float* gate_up, float* y, size_t rows, size_t width) override {
    if (rows == 0 || width == 0 || !Begin("SwiGlu")) return;
    Note(LaunchSwiGlu(gate_up, y, rows, width, stream_), "SwiGlu");
  }

  void Embed(const DeviceMatrix& table, std::span<const uint32_t> tokens, float* y) override {
    if (tokens.empty() || table.width == 0 || !Begin("Embed")) return;
    EmbedArgs args = {};
    args.table = table.data.raw();
    args.dtype = table.dtype;
    args.width = table.width;
    for (size_t at = 0; at < tokens.size(); at += args.count) {
      args.y = y + at * table.width;
      args.count =
          static_cast<uint32_t>(std::min<size_t>(kMaxEmbedTokens, tokens.size() - at));
      std::copy_n(tokens.begin() + static_cast<ptrdiff_t>(at), args.count, args.tokens);
      Note(LaunchEmbed(args, stream_), "Embed");
    }
  }

  void Choose(const DeviceLogits& logits, std::span<const TokenDraw> draws,
              ChosenToken* out) override {
    if (logits.rows == 0 || logits.vocab == 0 || !Begin("Choose")) return;
    TokenChoiceArgs args = {};
    args.logits = logits;
    for (; args.first_row < logits.rows; args.first_row += args.rows) {
      args.rows = std::min(kMaxDraws, logits.rows - args.first_row);
      args.out = out + args.first_row;
      std::copy_n(draws.begin() + args.first_row, args.rows, args.draws);
      Note(LaunchTokenChoice(args, stream_), "Choose");
    }
  }

  void Round(const float* from, DType dtype, void* to, size_t elements) override {
    if (elements == 0 || !Begin("Round")) return;
    Note(LaunchRound(from, dtype, to, elements, stream_), "Round");
  }

  void StoreKv(const DeviceKvStore& store) override { StoreKvEach({&store, 1}); }
  void StoreKvEach(std::span<const DeviceKvStore> stores) override {
    KvStores launch = {};
    const auto store = [&] {
      if (launch.count > 0 && Begin("StoreKv")) Note(LaunchStoreKv(launch, stream_), "StoreKv");
      launch.count = 0;
    };
    for (const DeviceKvStore& s : stores) {
      if (s.rows == 0 || s.vector_bytes == 0) continue;
      launch.stores[launch.count++] = s;
      if (launch.count == kMaxStores) store();
    }
    store();
  }

  void Attend(const DeviceAttention& attention) override {
    if (attention.rows == 0 || attention.heads == 0 || !Begin("Attend")) return;
    Note(attention_->Attend(attention), "Attend");
  }
  void AttendEach(std::span<const DeviceAttention> attentions) override {
    if (Begin("Attend")) Note(attention_->AttendEach(attentions), "Attend");
  }

  absl::StatusOr<std::unique_ptr<SparsePlan>> PlanSparse(std::span<const HeadPattern> patterns,
                                                         TokenRange prefill,
                                                         const DeviceAttention& last) override {
    QUARRY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(options_.ordinal), "PlanSparse"));
    return sparse_->Plan(patterns, prefill, last);
  }

  absl::Status AttendSparse(const SparsePlan& plan, const DeviceAttention& a) override {
    if (a.rows == 0 || a.heads == 0) return absl::OkStatus();
    QUARRY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(options_.ordinal), "AttendSparse"));
    const auto& on_card = static_cast<const DevicePlan&>(plan);
    return on_card.AllDense() ? attention_->Attend(a) : sparse_->Attend(on_card, a);
  }

  absl::StatusOr<HostMapping> MapHost(std::span<std::byte> bytes) override {
    if (bytes.empty()) return absl::InvalidArgumentError("no memory of the host to map");
    absl::StatusOr<HostMapping> mapping = Map(bytes);
    // A launch would report it as its own.
    if (!mapping.ok()) (void)cudaGetLastError();
    return mapping;
  }

  void UnmapHost(std::span<std::byte> bytes) override {
    if (!Begin("UnmapHost")) return;
    cudaStreamSynchronize(stream_);  // an error is the next report's
    Note(cudaHostUnregister(bytes.data()), "UnmapHost");
  }

  // Behind a failure nothing is submitted, and nothing is waited for that was not.
  void Ring(const DeviceRing& ring) override {
    if (!failure_.ok() || !Begin("Ring")) return;
    Note(LaunchRing(ring, reinterpret_cast<uint32_t*>(ring_arrived_.raw()), stream_), "Ring");
  }

  void TakeAnswer(const DeviceRing& ring) override {
    if (!failure_.ok() || !Begin("TakeAnswer")) return;
    const auto done =
        reinterpret_cast<CUdeviceptr>(&reinterpret_cast<shm::SlotHeader*>(ring.message.slot)->done);
    const CUresult waits =
        driver_.wait_value(stream_, done, ring.message.answered_bit, CU_STREAM_WAIT_VALUE_AND);
    if (waits == CUDA_SUCCESS) return Note(LaunchTakeAnswer(ring, stream_), "TakeAnswer");
    Note(driver_.Check(waits, "waiting for an answer"), "TakeAnswer");
  }

  // A failure meanwhile is the recording's; what failed before keeps it from being made.
  absl::StatusOr<std::unique_ptr<DeviceRecording>> Record(
      const std::function<void()>& call) override {
    QUARRY_RETURN_IF_ERROR(failure_);
    QUARRY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(options_.ordinal), "Record"));
    auto recording = Recording::Make(stream_, arena_.get(), [&](RecordedMemory* memory) {
      recorded_ = memory;
      call();
      recorded_ = nullptr;
      return failure_;
    });
    if (!recording.ok()) (void)cudaGetLastError();  // a launch would report it as its own
    QUARRY_RETURN_IF_ERROR(TakeFailure());          // says more than what it makes of the graph
    QUARRY_RETURN_IF_ERROR(recording.status());
    return std::unique_ptr<DeviceRecording>(*std::move(recording));
  }
  void Replay(const DeviceRecording& recording) override {
    if (!failure_.ok() || !Begin("Replay")) return;
    Note(static_cast<const Recording&>(recording).Replay(stream_), "Replay");
  }

  void Merge(float* o_a, float* lse_a, const float* o_b, const float* lse_b, size_t rows,
             uint32_t head_dim) override {
    if (rows == 0 || !Begin("Merge")) return;
    Note(LaunchMerge({o_a, lse_a, o_b, lse_b, rows, head_dim}, stream_), "Merge");
  }

 private:
  explicit CudaDevice(const CudaDeviceOptions& options)
      : options_(options), name_(absl::StrCat("cuda:", options.ordinal)) {}

  // Spare memory is taken back before the last of the budget is mapped: pages stay, and what
  // recordings and CUDA itself take later would come on top of it.
  absl::StatusOr<void*> AllocateBeforeSpare(size_t bytes, std::string_view what) {
    const ArenaMap& map = arena_->map();
    while (map.spare() > 0) {
      absl::StatusOr<void*> data = arena_->Allocate(bytes, what, leave_end_);
      if (data.ok()) return data;
      const uint64_t needed = map.used() - map.spare();
      const bool hopeless = needed > map.limit() || bytes > map.limit() - needed;
      if (hopeless || !TakeSpareBack()) break;
    }
    return arena_->Allocate(bytes, what);
  }

  // Names the card; FailedPrecondition if it is none for us.
  absl::Status FindCard() {
    int count = 0;
    if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
      return absl::FailedPreconditionError(
          absl::StrCat(name_, ": no NVIDIA card, or no driver for CUDA 13: ",
                       cudaGetErrorString(error)));
    }
    if (options_.ordinal < 0 || options_.ordinal >= count) {
      return absl::FailedPreconditionError(
          absl::StrCat(name_, ": this machine has ", count, " CUDA devices"));
    }
    cudaDeviceProp properties;
    QUARRY_RETURN_IF_ERROR(
        CudaStatus(cudaGetDeviceProperties(&properties, options_.ordinal), name_));
    absl::StrAppend(&name_, " (", properties.name, ", compute capability ", properties.major, ".",
                    properties.minor, ")");
    multiprocessors_ = static_cast<uint32_t>(properties.multiProcessorCount);
    if (properties.major < 8) {
      return absl::FailedPreconditionError(
          absl::StrCat(name_, ": compute capability 8.0 or later is needed"));
    }
    return absl::OkStatus();
  }

  absl::Status Start() {
    QUARRY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(options_.ordinal), name_));
    QUARRY_RETURN_IF_ERROR(CudaStatus(cudaFree(nullptr), name_));  // makes the context
    QUARRY_ASSIGN_OR_RETURN(driver_, Driver::Load());
    const uint64_t context = ContextBytes(driver_, options_.ordinal);
    const uint64_t before = TakenBytes();
    QUARRY_RETURN_IF_ERROR(
        CudaStatus(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), name_));
    QUARRY_RETURN_IF_ERROR(LoadKernels());
    attention_ = std::make_unique<PartsAttention>(this, multiprocessors_, stream_);
    sparse_kernels_ = std::make_unique<CudaSparseKernels>(stream_);
    sparse_ =
        std::make_unique<SparsePrefill>(this, sparse_kernels_.get(), SparsePrefill::Options{});
    QUARRY_ASSIGN_OR_RETURN(staging_, Staging::Create(stream_));
    QUARRY_ASSIGN_OR_RETURN(uploads_, CopyStream::Create(stream_, cudaMemcpyHostToDevice));
    QUARRY_ASSIGN_OR_RETURN(downloads_, CopyStream::Create(stream_, cudaMemcpyDeviceToHost));
    QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Products> products, Products::Create());
    const uint64_t after = TakenBytes();
    const uint64_t overhead = context + (after - std::min(before, after));
    if (overhead >= options_.capacity_bytes) {
      return absl::ResourceExhaustedError(absl::StrCat(
          name_, ": CUDA itself takes ", overhead, " bytes of a budget of ",
          options_.capacity_bytes));
    }
    QUARRY_ASSIGN_OR_RETURN(
        arena_, Arena::Create(driver_, {options_.capacity_bytes, overhead, options_.ordinal}));
    QUARRY_ASSIGN_OR_RETURN(
        products_, WeightProducts::Create(this, arena_.get(), std::move(products), stream_));
    return absl::OkStatus();
  }

  absl::Status LoadKernels() const {
    for (const cudaError_t error :
         {PrepareRowKernels(), PrepareWeightKernels(), PrepareAttention(), PrepareSparseKernels(),
          PrepareRingKernels(), PrepareTokenChoice()}) {
      if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
        return absl::FailedPreconditionError(
            absl::StrCat(name_, ": this program has no code for it"));
      }
      QUARRY_RETURN_IF_ERROR(CudaStatus(error, absl::StrCat(name_, ": loading kernels")));
    }
    return absl::OkStatus();
  }

  // Whether the card can be asked; else the operation has failed.
  bool Begin(std::string_view operation) {
    const cudaError_t error = cudaSetDevice(options_.ordinal);
    Note(error, operation);
    return error == cudaSuccess;
  }

  // The first failure since the last report stays.
  void Note(const absl::Status& status, std::string_view operation) {
    if (status.ok() || !failure_.ok()) return;
    failure_ = absl::Status(status.code(),
                            absl::StrCat(std::string(operation), ": ", status.message()));
  }
  void Note(cudaError_t error, std::string_view operation) {
    if (error != cudaSuccess && failure_.ok()) failure_ = CudaStatus(error, operation);
  }
  absl::Status TakeFailure() { return std::exchange(failure_, absl::OkStatus()); }

  absl::StatusOr<HostMapping> Map(std::span<std::byte> bytes) {
    QUARRY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(options_.ordinal), "MapHost"));
    int same_addresses = 0;
    QUARRY_RETURN_IF_ERROR(CudaStatus(
        cudaDeviceGetAttribute(&same_addresses, cudaDevAttrCanUseHostPointerForRegisteredMem,
                               options_.ordinal),
        "MapHost"));
    if (same_addresses == 0 || driver_.wait_value == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(
          name_, same_addresses == 0 ? ": mapped memory of the host has other addresses here"
                                     : ": the driver has no waits of streams on memory"));
    }
    if (ring_arrived_.bytes() == 0) {
      QUARRY_ASSIGN_OR_RETURN(DeviceBuffer counter,
                              Allocate(sizeof(uint32_t), "a counter of blocks"));
      QUARRY_RETURN_IF_ERROR(
          CudaStatus(cudaMemsetAsync(counter.raw(), 0, sizeof(uint32_t), stream_), "MapHost"));
      ring_arrived_ = std::move(counter);
    }
    QUARRY_RETURN_IF_ERROR(
        CudaStatus(cudaHostRegister(bytes.data(), bytes.size(), cudaHostRegisterMapped),
                   absl::StrCat("mapping ", bytes.size(), " bytes of the host's memory")));
    return HostMapping(this, bytes);
  }

  const CudaDeviceOptions options_;
  std::string name_;
  uint32_t multiprocessors_ = 1;
  cudaStream_t stream_ = nullptr;
  Driver driver_;
  std::unique_ptr<Arena> arena_;
  uint64_t leave_end_ = 0;     // bytes, while somebody has spare memory
  DeviceBuffer ring_arrived_;  // blocks of a Ring, while it runs
  std::unique_ptr<Staging> staging_;
  std::unique_ptr<CopyStream> uploads_, downloads_;
  std::unique_ptr<WeightProducts> products_;
  std::unique_ptr<PartsAttention> attention_;
  std::unique_ptr<CudaSparseKernels> sparse_kernels_;
  std::unique_ptr<SparsePrefill> sparse_;
  RecordedMemory* recorded_ = nullptr;  // while a recording is made
  absl::Status failure_;  // the first since the last report
};

}  // namespace
}  // namespace quarry::cuda

namespace quarry {

absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions& options) {
  return cuda::CudaDevice::Create(options);
}

}  // namespace quarry
