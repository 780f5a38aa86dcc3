#include "daemon/stretch_index.h"

#include <algorithm>
#include <span>

namespace quarry {

void StretchIndex::Add(std::string_view tenant, const StretchId& content,
                       const StretchPlace& place) {
  absl::MutexLock lock(&mutex_);
  const auto [at, fresh] = tenants_[std::string(tenant)].try_emplace(content);
  Places& places = at->second;
  std::erase_if(places, [&](const StretchPlace& p) { return p.block == place.block; });
  if (places.size() == kMaxPlaces) places.erase(places.begin());
  places.push_back(place);
  contents_ += fresh ? 1 : 0;
  if (contents_ >= sweep_at_) SweepLocked();
}

std::vector<StretchPlace> StretchIndex::Find(std::string_view tenant,
                                             const StretchId& content) const {
  absl::MutexLock lock(&mutex_);
  const auto of_tenant = tenants_.find(std::string(tenant));
  if (of_tenant == tenants_.end()) return {};
  const auto at = of_tenant->second.find(content);
  if (at == of_tenant->second.end()) return {};
  return {at->second.rbegin(), at->second.rend()};
}

void StretchIndex::Sweep() {
  absl::MutexLock lock(&mutex_);
  SweepLocked();
}

void StretchIndex::SweepLocked() {
  contents_ = 0;
  for (auto& [tenant, contents] : tenants_) {
    absl::erase_if(contents, [&](auto& entry) {
      std::erase_if(entry.second, [&](const StretchPlace& place) {
        return store_.PublishedBytes(tenant, std::span(&place.block, 1)) == 0;
      });
      return entry.second.empty();
    });
    contents_ += contents.size();
  }
  absl::erase_if(tenants_, [](const auto& tenant) { return tenant.second.empty(); });
  sweep_at_ = std::max<size_t>(1024, 2 * contents_);
}

}  // namespace quarry
