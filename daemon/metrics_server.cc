// The only file that knows prometheus-cpp.
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "daemon/metrics.h"
#include "prometheus/collectable.h"
#include "prometheus/exposer.h"
#include "prometheus/metric_family.h"

namespace quarry {
namespace {

prometheus::ClientMetric ToClientMetric(const MetricSample& sample) {
  prometheus::ClientMetric metric;
  for (const auto& [name, value] : sample.labels) metric.label.push_back({name, value});
  if (sample.type == MetricSample::Type::kCounter) {
    metric.counter.value = sample.value;
  } else {
    metric.gauge.value = sample.value;
  }
  return metric;
}

prometheus::MetricFamily ToFamily(const MetricHistogram& histogram) {
  prometheus::MetricFamily family;
  family.name = histogram.name;
  family.help = histogram.help;
  family.type = prometheus::MetricType::Histogram;
  prometheus::ClientMetric metric;
  metric.histogram.sample_count = histogram.snapshot.count();
  metric.histogram.sample_sum = histogram.snapshot.sum_seconds;
  for (int i = 0; i < LatencyHistogram::kBounds; ++i) {
    metric.histogram.bucket.push_back(
        {histogram.snapshot.cumulative[i], LatencyHistogram::BoundSeconds(i)});
  }
  family.metric.push_back(std::move(metric));
  return family;
}

class Collector : public prometheus::Collectable {
 public:
  explicit Collector(const Metrics& metrics) : metrics_(metrics) {}

  std::vector<prometheus::MetricFamily> Collect() const override {
    std::vector<prometheus::MetricFamily> families;
    MetricsSnapshot snapshot = metrics_.Collect();
    for (MetricSample& sample : metrics_.CollectAudits()) {
      snapshot.samples.push_back(std::move(sample));
    }
    for (const MetricSample& sample : snapshot.samples) {
      if (families.empty() || families.back().name != sample.name) {
        prometheus::MetricFamily& family = families.emplace_back();
        family.name = sample.name;
        family.help = sample.help;
        family.type = sample.type == MetricSample::Type::kCounter ? prometheus::MetricType::Counter
                                                                  : prometheus::MetricType::Gauge;
      }
      families.back().metric.push_back(ToClientMetric(sample));
    }
    for (const MetricHistogram& histogram : snapshot.histograms) {
      families.push_back(ToFamily(histogram));
    }
    return families;
  }

 private:
  const Metrics& metrics_;
};

class PrometheusServer : public MetricsServer {
 public:
  PrometheusServer(const std::string& listen, const Metrics& metrics)
      : collector_(std::make_shared<Collector>(metrics)), exposer_(Options(listen)) {
    exposer_.RegisterCollectable(collector_);
  }
  int port() const override {
    const std::vector<int> ports = exposer_.GetListeningPorts();
    return ports.empty() ? 0 : ports.front();
  }

 private:
  // A connection occupies a thread until its request has come: silent ones must not last.
  static std::vector<std::string> Options(const std::string& listen) {
    return {"listening_ports", listen, "num_threads", "4", "request_timeout_ms", "1000"};
  }

  const std::shared_ptr<Collector> collector_;
  prometheus::Exposer exposer_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(const MetricsOptions& options,
                                                                    const Metrics& metrics) {
  // The library reports a failed bind by an exception only.
  try {
    return std::make_unique<PrometheusServer>(options.listen, metrics);
  } catch (const std::exception& error) {
    return absl::FailedPreconditionError(
        absl::StrCat("metrics.listen = \"", options.listen,
                     "\": cannot listen there, is another quarryd running? (", error.what(), ")"));
  }
}

}  // namespace quarry
