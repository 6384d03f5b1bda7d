# Kafka's jars (libs/, copied here by Maven) behind the three commands of the official image that docker-compose.yml uses.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends openjdk-17-jre-headless && rm -rf /var/lib/apt/lists/*
COPY libs /opt/kafka/libs
RUN mkdir -p /opt/kafka/bin /var/lib/kafka/data \
 && wrapper() { printf '#!/bin/sh\nexec java -Xmx256m -cp "/opt/kafka/libs/*" %s "$@"\n' "$2" > /opt/kafka/bin/$1; } \
 && wrapper kafka-storage.sh kafka.tools.StorageTool \
 && wrapper kafka-topics.sh org.apache.kafka.tools.TopicCommand \
 && wrapper kafka-server-start.sh kafka.Kafka \
 && chmod +x /opt/kafka/bin/*.sh
