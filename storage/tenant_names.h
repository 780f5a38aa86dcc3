// Tenants by one address each, so that comparing and storing them is cheap.
#pragma once

#include <functional>
#include <set>
#include <string>
#include <string_view>

namespace quarry {

using TenantName = const std::string*;

// Not thread-safe. Names are never forgotten: tenants are those whom the daemon has authenticated.
class TenantNames {
 public:
  TenantName Intern(std::string_view tenant) { return &*names_.emplace(tenant).first; }
  // Null for a tenant that never reserved anything.
  TenantName Find(std::string_view tenant) const {
    auto it = names_.find(tenant);
    return it == names_.end() ? nullptr : &*it;
  }

 private:
  std::set<std::string, std::less<>> names_;
};

}  // namespace quarry
